"""Prompts of a benchmark: a folder of .txt files, a JSON or a CSV file → names, words and skill tags."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

TAG_KEYS = ("tags", "skills")


@dataclass(frozen=True)
class Prompt:
    """One prompt; `tags` name the skills that it asks for."""

    id: str
    text: str
    tags: tuple[str, ...] = ()


def read_prompts(path: str | Path) -> dict[str, Prompt]:
    """Reads prompts by id.

    Args:
        path: a folder of ID.txt; or JSON, {id: text} or {id: {"prompt": text, "tags": […]}} or a list of the latter
            with "id"; or CSV with the columns id, prompt and, if wanted, tags, parted by ";". GenAI-Bench's own
            genai_image.json is such a file.
    Raises:
        ValueError: nothing there, no such form, an empty prompt, or an id that occurs twice.
    """
    path = Path(path)
    if path.is_dir():
        found = [Prompt(file.stem, _text(file).strip()) for file in sorted(path.glob("*.txt"))]
    elif path.suffix.lower() == ".json":
        found = list(_from_json(path))
    elif path.suffix.lower() == ".csv":
        found = list(_from_csv(path))
    else:
        raise ValueError(f"{path}: expected a folder of .txt files, a .json or a .csv file")
    if not found:
        raise ValueError(f"{path}: holds no prompts")
    prompts: dict[str, Prompt] = {}
    for prompt in found:
        if not prompt.id or not prompt.text:
            raise ValueError(f"{path}: prompt {prompt.id!r} is empty, or has no id")
        if prompt.id in prompts:
            raise ValueError(f"{path}: the id {prompt.id!r} occurs twice")
        prompts[prompt.id] = prompt
    return prompts


def with_skills(prompts: Mapping[str, Prompt], path: str | Path) -> dict[str, Prompt]:
    """Adds the tags of a file {tag: [ids]}, as GenAI-Bench's genai_skills.json.

    There ids are numbers, in the prompts they are written "00001": a number names the prompt of that value.

    Raises:
        ValueError: no such form, or an id that no prompt has.
    """
    path = Path(path)
    skills = _json(path)
    if not isinstance(skills, dict) or not all(isinstance(ids, list) for ids in skills.values()):
        raise ValueError(f"{path}: expected JSON that names the ids of each tag, as {{tag: [ids]}}")
    by_number = {int(name): name for name in prompts if re.fullmatch("[0-9]+", name)}
    found = {name: list(prompt.tags) for name, prompt in prompts.items()}
    for tag, ids in skills.items():
        for entry in ids:
            name = by_number.get(entry) if isinstance(entry, int) else entry
            if name not in found:
                raise ValueError(f"{path}: tag {tag!r} names {entry!r}, which is not among the {len(prompts)} prompts")
            found[name].append(tag)
    return {name: replace(prompts[name], tags=tuple(dict.fromkeys(tags))) for name, tags in found.items()}


def digest(path: str | Path) -> str:
    """SHA-256 of a file; of a folder, that of the names and contents of its .txt files in order of name."""
    path, total = Path(path), hashlib.sha256()
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    for file in sorted(path.glob("*.txt"), key=lambda file: file.name):
        total.update(f"{file.name}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def check_digest(path: str | Path, expected: str | None) -> str:
    """Returns `digest(path)`.

    Raises:
        ValueError: it is not the expected one, of which the beginning is enough.
    """
    found = digest(path)
    if expected and not found.startswith(expected.lower()):
        raise ValueError(f"{path}: SHA-256 is {found}, expected {expected}; it is another version, or was changed")
    return found


def _from_json(path: Path) -> Iterator[Prompt]:
    data = _json(path)
    rows = list(data.items()) if isinstance(data, dict) else [(None, row) for row in data]
    for number, (name, row) in enumerate(rows):
        row = {"prompt": row} if isinstance(row, str) else row
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or (name is None and "id" not in row):
            raise ValueError(f"{path}: entry {name or number} has no id, or no text under 'prompt'")
        yield Prompt(str(row["id"] if name is None else name), row["prompt"].strip(), _tags(row, path))


def _from_csv(path: Path) -> Iterator[Prompt]:
    rows = csv.DictReader(io.StringIO(_text(path), newline=""))
    if missing := {"id", "prompt"} - set(rows.fieldnames or ()):
        raise ValueError(f"{path}: lacks the column {', '.join(sorted(missing))}; it has {rows.fieldnames}")
    for row in rows:
        yield Prompt((row["id"] or "").strip(), (row["prompt"] or "").strip(), _tags(row, path))


def _tags(row: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    value = next((row[key] for key in TAG_KEYS if row.get(key)), ())
    if isinstance(value, str):
        value = value.split(";")
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{path}: tags {value!r}: expected a list of names")
    return tuple(dict.fromkeys(tag for tag in (str(tag).strip() for tag in value) if tag))


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None
