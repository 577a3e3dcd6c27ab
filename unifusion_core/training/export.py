"""A trained model → the folder that `load_model` and ComfyUI's UniFusion Load Model open."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..checkpoint import save_checkpoint
from ..presets import ModelSpec, spec_to_dict
from ..vaes import OURS, is_ours, load_vae, save_vae
from .ema import EMA
from .scaled import whole


def export(
    folder: Path,
    spec: ModelSpec,
    model: nn.Module,
    ema: EMA | None,
    accelerator: Accelerator,
    *,
    vlm: Path,
    vae: Path,
    dtype: torch.dtype,
    copy_vlm: bool = False,
) -> Path:
    """Writes `model.safetensors` from the averaged weights, with `vae.safetensors` and a link `vlm` beside it.

    Every process must call it: under FSDP2 each holds a part of every tensor.

    Args:
        copy_vlm: a copy that can be moved elsewhere, instead of a link to the folder.
    """
    tensors = whole_tensors(model, ema, accelerator, dtype)
    path = folder / "model.safetensors"
    if accelerator.is_main_process:
        save_checkpoint(path, tensors, spec_to_dict(spec))
        place_vae(vae, folder / OURS)
        _place(vlm, folder / "vlm", copy=copy_vlm)
    accelerator.wait_for_everyone()
    return path


def whole_tensors(model: nn.Module, ema: EMA | None, accelerator: Accelerator, dtype: torch.dtype) -> dict[str, Tensor]:
    """The averaged weights, whole, in the main process; none in the others, which must call it too."""
    averaged, tensors = ema.shadow if ema else {}, {}
    for name, value in model.state_dict().items():
        value = averaged.get(name, value)
        value = whole(value)
        if accelerator.is_main_process:
            tensors[name] = value.to("cpu", dtype)
    return tensors


def place_vae(source: Path, target: Path) -> None:
    """A copy; what is not a file of ours, such as diffusers' folder, is written as one, in its own dtype."""
    if is_ours(source):
        _place(source, target, copy=True)
    else:
        save_vae(target, load_vae(source, dtype=None))


def for_training(spec: ModelSpec, vlm_identity: str, size: int, preview, name: str | None) -> ModelSpec:
    """The spec that the file will carry."""
    return replace(spec, name=name or spec.name, vlm=vlm_identity, size=(size, size), preview=preview)


def _place(source: Path, target: Path, copy: bool) -> None:
    """A copy, or a link; beside its place first, so that a kill leaves the old one or the new one whole."""
    if target.exists() and target.samefile(source):
        return
    beside = target.with_name(f".{target.name}.new")
    _remove(beside)
    if not copy:
        _link(source, beside)
    elif source.is_dir():
        shutil.copytree(source, beside)
    else:
        shutil.copyfile(source, beside)
    if target.is_dir() or target.is_symlink():
        _remove(target)
    os.replace(beside, target)


def _link(source: Path, target: Path) -> None:
    try:
        os.symlink(source.resolve(), target, target_is_directory=source.is_dir())
    except OSError as error:
        raise ValueError(
            f"no link to {source} can be made here ({error}); the same run with --copy-vlm copies it"
        ) from None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
