"""A file of JSON lines that only grows, so that a long evaluation that was killed goes on where it stood.

Its first line says what the rest belongs to. A line that a kill cut short is dropped, and asked for again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


class Journal:
    """Opens or begins a journal.

    Args:
        header: what the entries depend on, JSON-able; that of a journal already there must be the same.
    Attributes:
        entries: what the file holds, in its order.
    Raises:
        ValueError: the file belongs to something else, or holds a damaged line that is not the last.
    """

    def __init__(self, path: str | Path, header: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.header: Entry = json.loads(json.dumps(header))
        self.entries: list[Entry] = []
        lines = self._whole_lines()
        if lines:
            found, *self.entries = lines
            self._check(found)
        else:
            self._write([self.header])

    def add(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Writes entries down; when it returns they are on the disk."""
        new = [dict(entry) for entry in entries]
        self._write(new)
        self.entries += new

    def _whole_lines(self) -> list[Entry]:
        """Reads the file, and cuts off a last line without an end."""
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            with self.path.open("r+b") as file:
                file.truncate(whole)
        lines = []
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            try:
                lines.append(dict(json.loads(line)))
            except (ValueError, TypeError):
                raise ValueError(
                    f"{self.path}: line {number} is damaged; delete that line (it will be asked again) or the file"
                ) from None
        return lines

    def _check(self, found: Entry) -> None:
        for key in sorted(self.header.keys() | found.keys()):
            old, new = found.get(key), self.header.get(key)
            if old != new:
                raise ValueError(
                    f"{self.path}: was begun with {key} {old!r}, now it is {new!r}; "
                    "go on with the same, or write to another folder"
                )

    def _write(self, entries: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
