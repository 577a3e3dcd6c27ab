"""What the loader nodes list, and where it lies. A name from a workflow only ever picks from the list."""

from __future__ import annotations

import json
import os
import struct
from functools import lru_cache
from pathlib import Path

import folder_paths

EMBEDDED_VLM = "micro (embedded)"
EMBEDDED_MODELS = ("micro (embedded)", "micro-base (embedded, stage 1)")
WEIGHTS = Path(__file__).parents[1] / "unifusion_core" / "weights" / "micro"
MODEL_FOLDERS = ("unifusion", "diffusion_models", "checkpoints")
VLM_FOLDERS = ("vlm", "text_encoders")

# Appended, so that folders of the user's extra_model_paths.yaml stay.
folder_paths.add_model_folder_path("unifusion", os.path.join(folder_paths.models_dir, "unifusion"))
folder_paths.add_model_folder_path("vlm", os.path.join(folder_paths.models_dir, "vlm"))


def list_models() -> list[str]:
    return [*EMBEDDED_MODELS, *_model_files()]


def list_vlms() -> list[str]:
    return [EMBEDDED_VLM, *_vlm_folders()]


def model_path(name: str) -> Path:
    """The file of a listed model.

    Raises:
        ValueError: it is not listed.
    """
    if name in EMBEDDED_MODELS:
        return WEIGHTS / ("edit.safetensors" if name == EMBEDDED_MODELS[0] else "base.safetensors")
    return _listed(name, _model_files(), "a UniFusion file into models/unifusion")


def vlm_path(name: str) -> Path:
    """The folder of a listed VLM."""
    return WEIGHTS / "vlm" if name == EMBEDDED_VLM else _listed(name, _vlm_folders(), "a VLM's folder into models/vlm")


def stamp(path: Path) -> str:
    """Changes when the file or anything in the folder does."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return " ".join(f"{file.name}:{file.stat().st_mtime_ns}:{file.stat().st_size}" for file in files)


def _listed(name: str, paths: dict[str, Path], cure: str) -> Path:
    if name not in paths:
        raise ValueError(f"{name!r} is not on this server; put {cure} and refresh the browser")
    return paths[name]


def _model_files() -> dict[str, Path]:
    found = {}
    for folder in MODEL_FOLDERS:
        for name in folder_paths.get_filename_list(folder):
            path = folder_paths.get_full_path(folder, name)
            if path and name.endswith(".safetensors") and _is_model(path, os.path.getmtime(path)):
                found.setdefault(f"{folder}/{name}".replace(os.sep, "/"), Path(path))
    return found


def _vlm_folders() -> dict[str, Path]:
    roots = [Path(root) for folder in VLM_FOLDERS for root in folder_paths.get_folder_paths(folder)]
    configs = [(root, path) for root in roots if root.is_dir() for path in sorted(root.glob("*/config.json"))]
    return {f"{root.name}/{path.parent.name}": path.parent for root, path in configs}


@lru_cache(maxsize=4096)
def _is_model(path: str, modified: float) -> bool:
    """Whether a safetensors header is a UniFusion model's, ours or one that core's ModelSave wrote."""
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length < 100_000_000:
            return False
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return False
    return "unifusion_spec" in header or "dit.time_mod_proj.weight" in header
