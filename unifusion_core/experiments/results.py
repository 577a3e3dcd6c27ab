"""Measured values as files: JSON beside the arms' weights, under a name of all that decides them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image

from ..files import save_json, save_png
from ..pipeline import EMBEDDED, WEIGHTS, load_model
from .arms import Arm, load, weights
from .claim import Shipped
from .measured import Measured
from .measures import MEASURES

VERSION = 1  # raise it where a measure changes, so that older results are taken anew


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all results of a run share. steps: of the reference arm. num: cases of a measure."""

    folder: Path
    steps: int
    num: int


def result_path(of: Arm | Shipped, by: str, seed: int, setting: Setting) -> Path:
    """Where the result of one model, measure and seed is kept."""
    if isinstance(of, Arm):
        model = weights(of, seed, setting.folder, setting.steps).stem
    else:
        model = f"{of}-{_digest(WEIGHTS / 'micro' / f'{EMBEDDED[of]}.safetensors')}"
    key = sha256(repr((model, by, seed, setting.num, VERSION)).encode()).hexdigest()[:8]
    return setting.folder / "measured" / f"{model}-{by.replace(', ', '-').replace(' ', '-')}-{seed}-{key}.json"


def measure(of: Arm | Shipped, by: str, seed: int, setting: Setting) -> Path:
    """Takes a measure of a model unless that was done; returns where it is kept."""
    path = result_path(of, by, seed, setting)
    if not path.is_file():
        model = load(of, seed, setting.folder, steps=setting.steps) if isinstance(of, Arm) else load_model(of)
        save_result(path, MEASURES[by].take(model, seed, setting.num))
    return path


def save_result(path: Path, found: Measured) -> None:
    """Writes the values as JSON, and the pictures of each label as one row beside it."""
    rows = {}
    for number, (label, pictures) in enumerate(found.pictures.items()):
        rows[label] = path.with_name(f"{path.stem}-{number}.png").name
        row = np.concatenate([np.asarray(picture) for picture in pictures], axis=1)
        save_png(path.parent / rows[label], Image.fromarray(row))
    values = {name: [round(value, 5) for value in numbers] for name, numbers in found.values.items()}
    save_json(path, {"values": values, "titles": found.titles, "pictures": rows})


def read_result(path: Path) -> Measured:
    """Reads what `save_result` wrote; pictures are square."""
    data = json.loads(path.read_text(encoding="utf-8"))
    pictures = {}
    for label, name in data["pictures"].items():
        with Image.open(path.parent / name) as row:
            side = row.height
            pictures[label] = [row.crop((left, 0, left + side, side)) for left in range(0, row.width, side)]
    return Measured(data["values"], pictures, data["titles"])


def _digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()[:8]
