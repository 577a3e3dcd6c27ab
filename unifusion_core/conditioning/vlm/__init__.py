"""Frozen VLMs: a transformers folder -> FrozenVLM.  `load_vlm(folder).encode([Request("a red heart")])`"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import logging

from .base import FrozenVLM, Prompts, Request, every_third
from .internvl import InternVL, read_preprocessor
from .tiling import load_image

__all__ = ["FrozenVLM", "InternVL", "Prompts", "Request", "every_third", "load_image", "load_vlm"]

FAMILIES: dict[str, type[FrozenVLM]] = {"internvl": InternVL}


def load_vlm(
    folder: str | Path,
    layers: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> FrozenVLM:
    """Loads a VLM from a local transformers folder; nothing is downloaded, no code of the folder is run.

    Args:
        layers: rising indices to tap, i = residual stream after i layers; None = every third (2, 5, 8, ...).
        dtype: None keeps the file's.
    Raises:
        ValueError: not such a folder, an unknown family, weights missing, damaged, incomplete or stored as pickle.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected a transformers model folder on this machine")
    config = _read_json(folder / "config.json")
    family = config.get("model_type")
    if family == "internvl_chat":
        raise ValueError(f"{folder}: original InternVL format, which needs its own code; use the folder named '-hf'")
    if family not in FAMILIES:
        raise ValueError(f"{folder}: model_type {family!r} is not supported; one of {', '.join(FAMILIES)}")
    _check_weights(folder)

    local = {"local_files_only": True, "trust_remote_code": False}
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # transformers draws one for every load
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
        model, report = AutoModelForImageTextToText.from_pretrained(
            folder,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # named below, in one line
            dtype=dtype or "auto",
            **local,
        )
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{folder}: {' '.join(str(error).split())[:300]}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    for what in ("missing_keys", "mismatched_keys"):
        if keys := sorted(key if isinstance(key, str) else key[0] for key in report[what]):
            raise ValueError(f"{folder}: {len(keys)} {what.replace('_', ' ')} in the weights, first {keys[0]}")

    options = {"layers": layers}
    if (folder / "verifi.json").is_file():
        options["system_prompt"] = _read_json(folder / "verifi.json").get("system_prompt")
    if family == "internvl":
        options |= read_preprocessor(folder, model.config.vision_config.image_size[0])
    return FAMILIES[family](model.to(device), tokenizer, **options)


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path.parent}: no {path.name}; expected a transformers model folder")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None


def _check_weights(folder: Path) -> None:
    """Names a missing, pickled or truncated weight file, which transformers reports in many lines or not at all."""
    index = folder / "model.safetensors.index.json"
    names = sorted(set(_read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    for name in names:
        path = folder / name
        if not path.is_file():
            pickled = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
            hint = f"; {pickled[0].name} is a pickle, which is not loaded: convert it to safetensors" if pickled else ""
            raise ValueError(f"{folder}: no {name}{hint}")
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            size = path.stat().st_size
            try:
                tensors = json.loads(file.read(length)) if 0 < length <= size - 8 else {}
            except ValueError:
                tensors = {}
        ends = [entry["data_offsets"][1] for key, entry in tensors.items() if key != "__metadata__"]
        if not ends or 8 + length + max(ends) != size:
            raise ValueError(f"{path}: truncated or not a safetensors file ({size} bytes)")
