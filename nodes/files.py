"""What the loader nodes list, and where it lies. A name from a workflow only ever picks from the list."""

from __future__ import annotations

import json
import os
import re
import struct
from functools import lru_cache
from pathlib import Path

import comfy
import folder_paths

from ..unifusion_core.checkpoint import SPEC_KEY
from ..unifusion_core.conditioning.adapter import KIND

EMBEDDED_VLM = "micro (embedded)"
EMBEDDED_MODELS = ("micro (embedded)", "micro-base (embedded, stage 1)")
WEIGHTS = Path(__file__).parents[1] / "unifusion_core" / "weights" / "micro"
LONGEST_HEADER = 100_000_000  # bytes
MARKS = frozenset({"unifusion_spec", "dit.time_mod_proj.weight"})
KREA2_MARKS = frozenset({"txtfusion.projector.weight", "model.diffusion_model.txtfusion.projector.weight"})
QWEN_VL_MARKS = frozenset({"visual.blocks.0.attn.qkv.weight", "model.visual.blocks.0.attn.qkv.weight"})
KREA2_VAES = ("qwen_image_vae", "wan_2.1_vae")  # its own; and one that reads the same latents
INDEX = ".safetensors.index.json"
SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")  # one of several; their index stands for them
MODEL_FOLDERS = ("unifusion", "diffusion_models", "checkpoints")
OF_TRAINING = frozenset({"cache", "latents", "state", "states"})  # folders of a training's OUT, which hold no models
VLM_FOLDERS = ("vlm", "text_encoders")

# Appended, so that folders of the user's extra_model_paths.yaml stay.
folder_paths.add_model_folder_path("unifusion", os.path.join(folder_paths.models_dir, "unifusion"))
folder_paths.add_model_folder_path("vlm", os.path.join(folder_paths.models_dir, "vlm"))


def list_models() -> list[str]:
    return [*EMBEDDED_MODELS, *_model_files()]


def list_vlms() -> list[str]:
    return [EMBEDDED_VLM, *_vlm_folders(), *_vlm_files()]


def list_adapters() -> list[str]:
    return [*_adapter_files()]


def model_path(name: str) -> Path:
    """The file of a listed model.

    Raises:
        ValueError: it is not listed.
    """
    if name in EMBEDDED_MODELS:
        return WEIGHTS / ("edit.safetensors" if name == EMBEDDED_MODELS[0] else "base.safetensors")
    return _listed(
        name, _model_files(), "a UniFusion file into models/unifusion, or Krea 2 into models/diffusion_models"
    )


def vlm_path(name: str) -> Path:
    """The folder, or the single file, of a listed VLM."""
    if name == EMBEDDED_VLM:
        return WEIGHTS / "vlm"
    return _listed(name, {**_vlm_folders(), **_vlm_files()}, "a VLM's folder into models/vlm")


def adapter_path(name: str) -> Path:
    """The file of a listed LAP adapter."""
    return _listed(name, _adapter_files(), "a LAP adapter into models/unifusion")


def tokenizer_of(path: Path) -> Path | None:
    """For a single file of Qwen-VL the tokenizer that ComfyUI brings; None for a folder, which has its own."""
    if path.is_dir():
        return None
    return Path(list(comfy.__path__)[0]) / "text_encoders" / "qwen25_tokenizer"


def is_krea2(path: Path) -> bool:
    """Whether a listed model is a ComfyUI single file of Krea 2."""
    return path.suffix == ".safetensors" and not KREA2_MARKS.isdisjoint(tensor_names(path))


def krea2_vae() -> Path | None:
    """The VAE of Krea 2's kind in ComfyUI's own folder, by its name."""
    names = [name for name in folder_paths.get_filename_list("vae") if name.endswith(".safetensors")]
    found = (name for kind in KREA2_VAES for name in names if kind in Path(name).name.lower())
    name = next(found, None)
    return None if name is None else Path(folder_paths.get_full_path_or_raise("vae", name))


def tensor_names(path: Path) -> frozenset[str]:
    """Names in the header of a safetensors file, or in an index of several; none of anything else."""
    return frozenset(_contents(path))


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
        for name, path in _of_kind("model", folder).items():
            found.setdefault(f"{folder}/{name}", path)
    return found


def _adapter_files() -> dict[str, Path]:
    return _of_kind("adapter", "unifusion")


def _of_kind(kind: str, folder: str) -> dict[str, Path]:
    found = {}
    for name in folder_paths.get_filename_list(folder):
        if SHARD.search(name) or (folder == "unifusion" and not OF_TRAINING.isdisjoint(Path(name).parts)):
            continue
        path = folder_paths.get_full_path(folder, name)
        if path and _kind(path, os.path.getmtime(path)) == kind:
            found[name.replace(os.sep, "/")] = Path(path)
    return found


def _vlm_folders() -> dict[str, Path]:
    """Transformers folders, alone or as `vlm` of a folder that our recipes made."""
    found = {}
    for folder, pattern in (*((name, "*/config.json") for name in VLM_FOLDERS), ("unifusion", "*/vlm/config.json")):
        for root in map(Path, folder_paths.get_folder_paths(folder)):
            for config in sorted(root.glob(pattern)) if root.is_dir() else ():
                found.setdefault(f"{folder}/{config.parent.relative_to(root).as_posix()}", config.parent)
    return found


def _vlm_files() -> dict[str, Path]:
    """Single files of Qwen-VL, for which ComfyUI brings the tokenizer."""
    found = {}
    for folder in VLM_FOLDERS:
        for name in folder_paths.get_filename_list(folder):
            path = folder_paths.get_full_path(folder, name)
            if path and os.sep not in name and _is_qwen_vl(path, os.path.getmtime(path)):
                found.setdefault(f"{folder}/{name}", Path(path))
    return found


@lru_cache(maxsize=4096)
def _is_qwen_vl(path: str, modified: float) -> bool:
    return path.endswith(".safetensors") and not QWEN_VL_MARKS.isdisjoint(tensor_names(Path(path)))


@lru_cache(maxsize=4096)
def _kind(path: str, modified: float) -> str | None:
    """What a file is for our nodes, by one reading of its header.

    A "model" is ours, its index of shards, what core's ModelSave wrote, or Krea 2; an "adapter" is told by its
    metadata, or by that of the first shard of its index.
    """
    file = Path(path)
    contents = _contents(file)
    if not MARKS.isdisjoint(contents) or (file.suffix == ".safetensors" and not KREA2_MARKS.isdisjoint(contents)):
        return "model"
    if file.name.endswith(INDEX):
        contents = _header(file.parent / Path(str(next(iter(contents.values()), None))).name)
    metadata = contents.get("__metadata__")
    spec = metadata.get(SPEC_KEY) if isinstance(metadata, dict) else None
    return "adapter" if isinstance(spec, str) and _json(spec).get("kind") == KIND else None


def _contents(path: Path) -> dict:
    """The header of a safetensors file, or what an index of several says of each tensor; nothing of anything else."""
    if path.name.endswith(INDEX):
        shards = _json(path.read_bytes()).get("weight_map")
        return shards if isinstance(shards, dict) else {}
    return _header(path)


def _header(path: Path) -> dict:
    """The header of a safetensors file; nothing of anything else."""
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        return _json(file.read(length)) if 0 < length < LONGEST_HEADER else {}


def _json(data: bytes | str) -> dict:
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
