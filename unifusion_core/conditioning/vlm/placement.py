"""Where and how squeezed a model's weights go: transformers' own quantisers, and accelerate's offload."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from transformers import BitsAndBytesConfig, FineGrainedFP8Config, TorchAoConfig

PACKAGES = {"bnb-4bit": "bitsandbytes", "bnb-8bit": "bitsandbytes", "torchao-int8": "torchao", "fp8": "accelerate"}
# eyes and head are small, and suffer most
KEPT = ["model.visual", "model.vision_tower", "model.multi_modal_projector", "lm_head"]
SIZE = re.compile(r"\d+(\.\d+)? ?([KMGT]i?B)", re.IGNORECASE)


def placement(
    device: torch.device | str, quantization: str | None, offload: str | Mapping[str | int, str | int] | None
) -> dict[str, Any]:
    """Returns keyword arguments for `from_pretrained`; {} where the model is loaded plainly and moved to `device`.

    Arguments are those of `vlm.load_vlm`.

    Raises:
        ValueError: an unknown quantisation, sizes or devices that mean nothing, or a package that is not installed.
    """
    options: dict[str, Any] = {}
    if quantization is not None:
        options["quantization_config"] = _quantizer(quantization)
        options["device_map"] = {"": str(device)}
    if offload is not None:
        _need("accelerate", "offload")
        options["device_map"] = "auto"
        if offload != "auto":
            options["max_memory"] = _budgets(offload)
    return options


def _quantizer(name: str) -> BitsAndBytesConfig | TorchAoConfig | FineGrainedFP8Config:
    if name not in PACKAGES:
        raise ValueError(f"quantization {name!r}: expected one of {', '.join(PACKAGES)} or None")
    _need(PACKAGES[name], f"quantization {name!r}")
    if name == "fp8":
        if not torch.cuda.is_available():
            raise ValueError("quantization 'fp8': needs an NVIDIA GPU of compute capability 8.9; use 'torchao-int8'")
        return FineGrainedFP8Config(modules_to_not_convert=KEPT)
    if name == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=KEPT)
    if name == "bnb-8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=KEPT)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=KEPT,
    )


def _need(package: str, what: str) -> None:
    if find_spec(package) is None:
        raise ValueError(f"{what}: needs the package {package}; run `pip install {package}`")


def _budgets(offload: str | Mapping[str | int, str | int]) -> dict[str | int, str | int]:
    """Turns {"cuda:0": "10GiB", "cpu": "20GiB"} into accelerate's max_memory, which counts the GPUs."""
    if isinstance(offload, str) or not offload:
        raise ValueError(f'offload {offload!r}: expected "auto" or sizes such as {{"cuda:0": "10GiB", "cpu": "20GiB"}}')
    budgets: dict[str | int, str | int] = {}
    for device, size in offload.items():
        if isinstance(size, str) and not SIZE.fullmatch(size.strip()) or isinstance(size, int) and size < 0:
            raise ValueError(f'offload[{device!r}] = {size!r}: expected a size such as "10GiB", or bytes')
        name, _, number = str(device).partition(":")
        if name not in ("cuda", "xpu", "mps", "cpu") and not isinstance(device, int):
            raise ValueError(f'offload names {device!r}: expected "cuda:0", "cuda:1", ..., "mps" or "cpu"')
        budgets[int(number or 0) if name in ("cuda", "xpu") else device] = size
    return budgets
