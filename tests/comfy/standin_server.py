"""A server whose real model files are small random stand-ins (see standins/), and the picture that ComfyUI ships."""

from __future__ import annotations

import shutil
from pathlib import Path

from .server import Comfy, make_base

STANDINS = Path(__file__).parent / "standins"
PICTURE = "example.png"  # in the input folder of every ComfyUI


def make_standin_base(base: Path, comfy: Comfy) -> Path:
    """As `make_base`, with the stand-ins beside the pack."""
    make_base(base)
    (base / "custom_nodes" / "StandIns").symlink_to(STANDINS, target_is_directory=True)
    return add_picture(base, comfy)


def add_picture(base: Path, comfy: Comfy) -> Path:
    shutil.copy(comfy.path / "input" / PICTURE, base / "input" / PICTURE)
    return base
