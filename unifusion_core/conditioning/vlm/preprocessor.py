"""What a VLM folder's preprocessor file says about pixels."""

from __future__ import annotations

import json
from pathlib import Path

NAMES = {"image_mean": "mean", "image_std": "std", "resample": "resample"}
FILES = ("preprocessor_config.json", "processor_config.json")


def read_config(folder: Path) -> tuple[Path | None, dict]:
    """Returns the file and its image settings; (None, {}) where there is none."""
    for path in (folder / name for name in FILES):
        if path.is_file():
            try:
                config = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{path}: not valid JSON ({error}); copy or download it again") from None
            return path, config.get("image_processor", config)
    return None, {}


def read_preprocessor(folder: Path, tile_size: int | None = None) -> dict:
    """Returns mean, std and resampling; {} where the folder has no such file.

    Raises:
        ValueError: the file asks for another tile size than `tile_size`, which the vision tower has; or damaged JSON.
    """
    path, config = read_config(folder)
    size = config.get("size") or {}
    if tile_size and {size.get("height", tile_size), size.get("width", tile_size)} != {tile_size}:
        raise ValueError(f"{path}: size {size}, but the vision tower takes {tile_size} px; copy this model's file")
    return {ours: config[theirs] for theirs, ours in NAMES.items() if config.get(theirs) is not None}
