"""Files and folders of VAEs ↔ VAEs: ours, Qwen-Image's and FLUX.2's, behind one pair of functions."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import load_checkpoint, load_into, load_tensors, save_checkpoint, tensor_names
from .diffusion.vae import VAE, QwenImageVAE, QwenImageVAESpec, VAESpec
from .diffusion.vae_flux2 import Flux2VAE, Flux2VAESpec, flux2_spec, from_flux2
from .krea2 import WEIGHTS
from .krea2 import load_vae as load_qwen_image

AnyVAE = VAE | QwenImageVAE | Flux2VAE
KIND = "kind"  # in the header of a file of ours, beside the fields of the spec; files of our own VAE have none
KINDS = {
    "autoencoder-kl": (VAESpec, VAE),
    "qwen-image": (QwenImageVAESpec, QwenImageVAE),
    "flux2": (Flux2VAESpec, Flux2VAE),
}
OURS = "vae.safetensors"


def load_vae(
    path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = torch.float32
) -> AnyVAE:
    """Loads a VAE: a file that `save_vae` wrote, or Qwen-Image's or FLUX.2's.

    Args:
        path: the last two as diffusers' folder (`config.json` and its weights) or as ComfyUI's single file
            (`qwen_image_vae`, `flux2-vae`); of ours the file, or the folder of a model that holds it.
        dtype: None = the file's own.
    Raises:
        ValueError: another VAE, or files that are missing or damaged.
    """
    path = Path(path)
    if path.is_dir():
        return _from_folder(path, device, dtype)
    names = tensor_names(path)
    if any(name.startswith("autoencoder.") for name in names):
        return _from_ours(path, device, dtype)
    if "bn.running_mean" in names:
        spec, tensors = _named(path, from_flux2, load_tensors(path, device, dtype))
        return _flux2(spec, tensors, path, device)
    if "encoder.conv1.weight" in names:
        return load_qwen_image(path, device=device, dtype=dtype)
    return _from_ours(path, device, dtype)  # which says what is wrong with it


def save_vae(path: str | Path, vae: AnyVAE, dtype: torch.dtype | None = None) -> None:
    """Writes any VAE as one file that `load_vae` opens; `dtype` of what is no whole number, None = as it is."""
    kind = next(name for name, (_, module) in KINDS.items() if isinstance(vae, module))
    tensors = {
        key: value.to(dtype) if dtype is not None and value.is_floating_point() else value
        for key, value in vae.state_dict().items()
    }
    save_checkpoint(path, tensors, asdict(vae.spec) | ({} if kind == "autoencoder-kl" else {KIND: kind}))


def is_ours(path: str | Path) -> bool:
    """Whether it is a file in the form that `save_vae` writes."""
    path = Path(path)
    return path.is_file() and any(name.startswith("autoencoder.") for name in tensor_names(path))


def _from_folder(folder: Path, device: torch.device | str, dtype: torch.dtype | None) -> AnyVAE:
    if not (folder / "config.json").is_file():
        if (folder / OURS).is_file():
            return _from_ours(folder / OURS, device, dtype)
        raise ValueError(
            f"{folder}: neither {OURS} nor diffusers' config.json of a VAE is in it; of a whole model in diffusers' "
            "layout give its folder vae"
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name = config.get("_class_name")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'}: not the settings of a VAE ({error}); copy it again") from None
    if name == "AutoencoderKLQwenImage":
        return load_qwen_image(folder, device=device, dtype=dtype)
    if name != "AutoencoderKLFlux2":
        raise ValueError(
            f"{folder}: a VAE of class {name!r}; AutoencoderKLFlux2 (32 channels) and AutoencoderKLQwenImage (16) are "
            "supported"
        )
    spec = _named(folder, flux2_spec, config)
    return _flux2(spec, load_tensors(folder / WEIGHTS, device, dtype), folder, device)


def _from_ours(path: Path, device: torch.device | str, dtype: torch.dtype | None) -> AnyVAE:
    data, tensors = load_checkpoint(path, device, dtype)
    kind = data.pop(KIND, "autoencoder-kl")
    if kind not in KINDS:
        raise ValueError(f"{path}: a VAE of kind {kind!r}; this version knows {', '.join(KINDS)}: update UniFusion")
    spec_class, module = KINDS[kind]
    try:
        spec = spec_class(**data)
    except TypeError as error:
        raise ValueError(f"{path}: its header does not describe a VAE: {error}") from None
    with torch.device("meta"):
        vae = module(spec)
    load_into(vae, tensors, name=str(path))
    return vae.to(device).eval().requires_grad_(False)


def _flux2(spec: Flux2VAESpec, tensors: dict[str, Tensor], path: Path, device: torch.device | str) -> Flux2VAE:
    tensors.setdefault("bn.num_batches_tracked", torch.tensor(0))  # no use is made of it
    with torch.device("meta"):
        vae = Flux2VAE(spec)
    load_into(vae.autoencoder, tensors, name=str(path))
    return vae.to(device).eval().requires_grad_(False)


def _named(path: Path, read, what):
    """What `read` makes of it; its complaint with the path before it."""
    try:
        return read(what)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
