"""LoRA files in the field's naming schemes → the one that ComfyUI reads."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

COMFY = "diffusion_model."
PEFT = ("base_model.model.", "transformer.", "dit.")
FLAT = "lora_unet_"  # kohya's names are flat; ComfyUI knows them for every model


def to_comfy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames diffusers' and PEFT's keys (`transformer.`, `base_model.model.`) to `diffusion_model.`; keeps others.

    A file that starts its names at the blocks themselves, as PEFT's `get_peft_model_state_dict` does, is taken too.
    """
    return {_renamed(name): value for name, value in tensors.items()}


def _renamed(name: str) -> str:
    if name.startswith((COMFY, FLAT)):
        return name
    for prefix in PEFT:
        name = name.removeprefix(prefix)
    return COMFY + name.removeprefix(COMFY)
