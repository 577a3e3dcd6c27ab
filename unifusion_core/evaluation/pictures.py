"""The pictures that a benchmark judges: found in a folder, or drawn into one by a model.

A folder holds ID.png, or several as ID-1.png, ID-2.png …, or as a folder ID of pictures in order of name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from ..conditioning.vlm import Request, load_image
from ..files import read_record, save_png
from ..pipeline import UniFusion
from .prompt_sets import Prompt

Progress = Callable[[str, int, int], None]
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
NUMBERED = re.compile(r"(.+)[-_]([0-9]+)")


@dataclass(frozen=True)
class Picture:
    """One picture of a prompt; `cell` is its place where a file holds a sheet: (row, column, rows, columns)."""

    path: Path
    cell: tuple[int, int, int, int] | None = None

    @property
    def name(self) -> str:
        if self.cell is None:
            return self.path.name
        row, column, _, columns = self.cell
        return f"{self.path.name}#{row * columns + column + 1}"

    @cached_property
    def digest(self) -> str:
        """Tells this picture's content from any other."""
        content = hashlib.sha256(self.path.read_bytes()).hexdigest()[:16]
        return content if self.cell is None else f"{content}#{self.cell[0]},{self.cell[1]}"

    def load(self) -> Image.Image:
        """Upright RGB.

        Raises:
            ValueError: not a picture, or a sheet that cannot be cut evenly.
        """
        image = load_image(self.path)
        if self.cell is None:
            return image
        row, column, rows, columns = self.cell
        if image.width % columns or image.height % rows:
            raise ValueError(f"{self.path}: {image.width}x{image.height} px cannot be cut into {rows}x{columns}")
        width, height = image.width // columns, image.height // rows
        return image.crop((column * width, row * height, (column + 1) * width, (row + 1) * height))


def find_pictures(
    folder: str | Path, ids: Collection[str], grid: tuple[int, int] | None = None
) -> dict[str, list[Picture]]:
    """Finds the pictures of each id; an id without any is left out, and so are files that belong to none.

    Args:
        grid: each file is a sheet of so many rows and columns of pictures, as DPG-Bench's script takes them.
    Raises:
        ValueError: no such folder, no picture of any of the ids, or ids with more pictures than others.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of pictures")
    files: dict[str, list[tuple[int, str, Path]]] = defaultdict(list)
    for path in folder.iterdir():
        if path.is_dir() and path.name in ids:
            files[path.name] += [(0, file.name, file) for file in path.iterdir() if _is_picture(file)]
        elif _is_picture(path):
            name, number = _split(path.stem, ids)
            if name is not None:
                files[name].append((number, path.name, path))
    found = {name: [Picture(path) for *_, path in sorted(files[name])] for name in ids if files.get(name)}
    if not found:
        raise ValueError(f"{folder}: holds no picture of any of the {len(ids)} prompts; expected ID.png or ID-1.png …")
    most = max(map(len, found.values()))
    if fewer := [name for name, pictures in found.items() if len(pictures) < most]:
        raise ValueError(
            f"{folder}: {len(found[fewer[0]])} pictures of {fewer[0]!r} and of {len(fewer) - 1} other prompts, but "
            f"{most} of {max(found, key=lambda name: len(found[name]))!r}; every prompt needs as many"
        )
    return {name: _cut(pictures, grid) for name, pictures in found.items()}


def draw_pictures(
    model: UniFusion,
    prompts: Mapping[str, Prompt],
    folder: str | Path,
    *,
    count: int = 4,
    seed: int = 0,
    name: str = "",
    rewriting: bool = True,
    progress: Progress | None = None,
    **sampling: Any,
) -> dict[str, list[Picture]]:
    """Draws `count` pictures of each prompt, of seeds `seed`, `seed` + 1, …; those already there are kept.

    Args:
        name: of the model, written into each picture.
        sampling: steps, guidance and size, as `UniFusion.sample`.
    Raises:
        ValueError: settings that cannot be used, a prompt that the VLM makes nothing of, or a picture already there
            that was made in another way.
    """
    folder, found = Path(folder), {}
    model.plan(("text",), schedule="text:0-1", **sampling)  # a mistake need not wait for the VLM
    made = {"model": name, "spec": model.spec.name, "vlm": model.vlm.identity, "rewriting": rewriting, **sampling}
    made = json.loads(json.dumps(made))
    for number, (key, prompt) in enumerate(prompts.items()):
        records = [{"prompt": prompt.text, "seed": seed + i, **made} for i in range(count)]
        todo = {folder / f"{key}-{i + 1}.png": record for i, record in enumerate(records)}
        if not all([_is_drawn(path, record) for path, record in todo.items()]):
            images = _draw(model, prompt, count=count, seed=seed, rewriting=rewriting, **sampling)
            for (path, record), image in zip(todo.items(), images, strict=True):
                save_png(path, image, record)
        found[key] = [Picture(path) for path in todo]
        if progress:
            progress("drawing", number + 1, len(prompts))
    return found


def _draw(model: UniFusion, prompt: Prompt, *, rewriting: bool, **sampling: Any) -> list[Image.Image]:
    try:
        conditions = model.prepare([Request(prompt.text)], rewriting=rewriting)
    except ValueError as error:
        raise ValueError(f"prompt {prompt.id!r}: {error}") from None
    return model.decode(model.sample(conditions, **sampling))


def _is_drawn(path: Path, record: Mapping[str, Any]) -> bool:
    if not path.is_file():
        return False
    found = read_record(path)
    if wrong := [key for key, value in record.items() if found.get(key) != value]:
        raise ValueError(
            f"{path}: was made with {wrong[0]} {found.get(wrong[0])!r}, now it is {record[wrong[0]]!r}; "
            "go on with the same, or draw into another folder"
        )
    return True


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _split(stem: str, ids: Collection[str]) -> tuple[str | None, int]:
    """The id that a file's name stands for, and its number."""
    if stem in ids:
        return stem, 0
    match = NUMBERED.fullmatch(stem)
    return (match[1], int(match[2])) if match and match[1] in ids else (None, 0)


def _cut(pictures: list[Picture], grid: tuple[int, int] | None) -> list[Picture]:
    if grid is None:
        return pictures
    rows, columns = grid
    cells = [(row, column, rows, columns) for row in range(rows) for column in range(columns)]
    return [Picture(picture.path, cell) for picture in pictures for cell in cells]
