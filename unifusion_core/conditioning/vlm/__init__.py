"""Frozen VLMs: files -> FrozenVLM.  `load_vlm(folder).encode([Request("a red heart")])`"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from .base import FrozenVLM, every_third
from .gemma3 import Gemma3
from .general import GeneralVLM
from .internvl import InternVL
from .llama import GemmaText, Llama, QwenText
from .loading import load, read_settings
from .qwen_vl import Qwen3VL, Qwen25VL
from .request import Prompts, Request
from .t5 import T5TextEncoder, is_t5, load_t5
from .tiling import load_image

__all__ = ["FrozenVLM", "InternVL", "Prompts", "Request", "T5TextEncoder", "every_third", "load_image", "load_vlm"]

FAMILIES: dict[str, type[FrozenVLM]] = {
    "internvl": InternVL,
    "gemma3": Gemma3,
    "qwen2_5_vl": Qwen25VL,
    "qwen3_vl": Qwen3VL,
    "llama": Llama,
    "qwen2": QwenText,
    "qwen3": QwenText,
    "gemma3_text": GemmaText,
}


def load_vlm(
    path: str | Path,
    layers: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    tokenizer: str | Path | None = None,
    quantization: str | None = None,
    offload: str | Mapping[str | int, str | int] | None = None,
) -> FrozenVLM | T5TextEncoder:
    """Loads a VLM from files on this machine; nothing is downloaded, no code of a folder is run.

    Weights stay memory-mapped in the file's dtype until they are used. All must be there and none may be left over.
    A T5 comes as what stands in a VLM's place for a model that was trained on it; it reads prompts and writes nothing.

    Args:
        path: a transformers folder, or one .safetensors text encoder as ComfyUI keeps it (models/text_encoders).
        layers: rising indices to tap, i = residual stream after i layers; None = every third (2, 5, 8, ...).
        dtype: None keeps the file's (bfloat16 for what was scaled fp8).
        tokenizer: folder of the tokenizer files, which a single file needs and which overrides a model folder's own.
        quantization: "bnb-4bit", "bnb-8bit", "torchao-int8" or "fp8" squeezes the decoder's linear layers while
            loading; the text that VERIFI writes then differs from the plain model's.
        offload: "auto", or the most memory to fill by device, {"cuda:0": "10GiB", "cpu": "20GiB"}; what does not fit is
            read from disk layer by layer in each forward. Decides where the model runs, whatever `device` says.
    Raises:
        ValueError: in one line, what is wrong with the files and what to do: no such path, no or another model, weights
            missing, damaged, incomplete, left over, stored as pickle, GGUF or fp8 without scale, no tokenizer or one of
            another model, code needed, a package not installed.
    """
    if is_t5(path):
        if extra := next((value for value in (quantization, offload) if value), None):
            raise ValueError(f"{path}: a T5 is loaded whole, not by {extra!r}; leave quantization and offload out")
        encoder = load_t5(path, device, dtype, tokenizer=tokenizer)
        return encoder if layers is None else encoder.tapping(layers)
    loaded = load(path, device, dtype, tokenizer=tokenizer, quantization=quantization, offload=offload)
    family = FAMILIES.get(loaded.model.config.model_type, GeneralVLM)
    settings = read_settings(loaded.folder, "verifi.json")
    options = {"layers": layers, "system_prompt": settings.get("system_prompt")}
    try:
        options |= family.folder_options(loaded.folder, loaded.model)
        vlm = family(loaded.model, loaded.tokenizer, **options)
        vlm._frame(system=False)  # a damaged chat template shows here and not at the first prompt
    except ValueError as error:
        named = str(error) if str(loaded.folder) in str(error) else f"{path}: {error}"
        raise ValueError(named) from error
    return vlm
