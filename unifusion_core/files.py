"""Files that are whole or not there: written beside their place, then renamed into it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

PNG_KEY = "unifusion"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a name beside `path` to write to; it takes the place of `path` unless an error is raised."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_json(path: str | Path, data: Any) -> None:
    text = json.dumps(data, indent=2) + "\n"
    with replacing(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_png(path: str | Path, image: Image.Image, record: dict[str, Any] | None = None) -> None:
    """Saves a picture; `record` says how it was made, as JSON in the text chunk `unifusion`."""
    info = PngImagePlugin.PngInfo()
    if record is not None:
        info.add_text(PNG_KEY, json.dumps(record))
    with replacing(Path(path)) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def save_jpg(path: str | Path, image: Image.Image) -> None:
    """Saves a sheet of many pictures, a tenth as large as a PNG."""
    with replacing(Path(path)) as temporary:
        image.save(temporary, format="JPEG", quality=90, subsampling=0)


def read_record(path: str | Path) -> dict[str, Any]:
    """Reads what `save_png` recorded in a picture.

    Raises:
        ValueError: the picture carries no record.
    """
    with Image.open(path) as image:
        text = image.info.get(PNG_KEY)
    if text is None:
        raise ValueError(f"{path}: no text chunk {PNG_KEY!r}; the picture was not made by UniFusion, or was converted")
    return json.loads(text)
