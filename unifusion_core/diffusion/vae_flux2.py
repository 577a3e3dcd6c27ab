"""Images ↔ latents by diffusers' AutoencoderKLFlux2, the VAE of 32 channels that the large presets are made for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from .vae import check_images, check_latents

CLASS = AutoencoderKLFlux2.__name__
PATCH = 2  # latents are normalised in patches of so many a side, each place of a patch by itself
ASIDE = {"encoder.quant_conv.": "quant_conv.", "decoder.post_quant_conv.": "post_quant_conv."}


@dataclass(frozen=True, kw_only=True)
class Flux2VAESpec:
    """An AutoencoderKLFlux2; by default FLUX.2's own.

    decoder_channels: None = those of the encoder. eps: of the BatchNorm that normalises latents. No tensor's shape
    tells `groups` and `eps`.
    """

    latent_channels: int = 32
    block_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_channels: tuple[int, ...] | None = None
    layers_per_block: int = 2
    groups: int = 32
    middle_attention: bool = True
    quant_conv: bool = True
    eps: float = 1e-4

    def __post_init__(self) -> None:
        for name in ("block_channels", "decoder_channels"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def compression(self) -> int:
        return 2 ** (len(self.block_channels) - 1)

    @property
    def multiple(self) -> int:
        """What both sides of a picture must divide by."""
        return self.compression * PATCH

    @property
    def decoder_values(self) -> int:
        """About as many numbers as decoding holds at once for a pixel: eight maps of the widest at full size."""
        return 8 * max((self.decoder_channels or self.block_channels)[:2])


class Flux2VAE(nn.Module):
    """`VAE`'s encode and decode by diffusers' AutoencoderKLFlux2.

    FLUX.2 itself draws patches of 2x2 latents; they are normalised as those patches, and passed as single latents
    [B, 32, H/8, W/8], which a DiT of patch size 2 cuts in the same way.
    """

    def __init__(self, spec: Flux2VAESpec) -> None:
        super().__init__()
        self.spec = spec
        blocks = len(spec.block_channels)
        other = {} if spec.decoder_channels is None else {"decoder_block_out_channels": spec.decoder_channels}
        self.autoencoder = AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            block_out_channels=spec.block_channels,
            layers_per_block=spec.layers_per_block,
            latent_channels=spec.latent_channels,
            norm_num_groups=spec.groups,
            use_quant_conv=spec.quant_conv,
            use_post_quant_conv=spec.quant_conv,
            mid_block_add_attention=spec.middle_attention,
            batch_norm_eps=spec.eps,
            **other,
        )

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in 0..1 → latents [B, C, H/8, W/8], the posterior's mode; H and W must divide by 16."""
        pixels = check_images(images, self.spec.multiple) * 2 - 1
        raw = self.autoencoder.encode(pixels.to(self.autoencoder.dtype)).latent_dist.mode()
        mean, std = self._statistics()
        return F.pixel_shuffle((F.pixel_unshuffle(raw.float(), PATCH) - mean) / std, PATCH)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w], h and w even → images [B, 3, 8 h, 8 w] in 0..1."""
        check_latents(latents, self.spec.latent_channels, PATCH)
        mean, std = self._statistics()
        raw = F.pixel_shuffle(F.pixel_unshuffle(latents.float(), PATCH) * std + mean, PATCH)
        images = self.autoencoder.decode(raw.to(self.autoencoder.dtype)).sample
        return (images.float() * 0.5 + 0.5).clamp(0, 1)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of raw latents [1, 4 C, 1, 1], float32."""
        counted = self.autoencoder.bn
        mean, variance = (each.float().view(1, -1, 1, 1) for each in (counted.running_mean, counted.running_var))
        return mean, (variance + self.spec.eps).sqrt()


def flux2_spec(config: Mapping[str, Any]) -> Flux2VAESpec:
    """The spec that diffusers' `vae/config.json` describes.

    Raises:
        ValueError: another class, or options that FLUX.2's VAE does not use.
    """
    if (name := config.get("_class_name")) != CLASS:
        raise ValueError(f"a VAE of class {name!r}, not {CLASS}")
    fixed = {"in_channels": 3, "out_channels": 3, "act_fn": "silu", "patch_size": [PATCH, PATCH]}
    odd = {key: config[key] for key, value in fixed.items() if config.get(key, value) != value}
    pairs = {config.get("use_quant_conv", True), config.get("use_post_quant_conv", True)}
    if odd or len(pairs) == 2:
        raise ValueError(f"a {CLASS} with {odd or 'one of its two quant_conv'}: only FLUX.2's own is supported")
    known = {"latent_channels": "latent_channels", "block_channels": "block_out_channels"}
    known |= {"decoder_channels": "decoder_block_out_channels", "layers_per_block": "layers_per_block"}
    known |= {"groups": "norm_num_groups", "middle_attention": "mid_block_add_attention"}
    known |= {"quant_conv": "use_quant_conv", "eps": "batch_norm_eps"}
    return Flux2VAESpec(**{ours: config[theirs] for ours, theirs in known.items() if theirs in config})


def from_flux2(tensors: Mapping[str, Tensor]) -> tuple[Flux2VAESpec, dict[str, Tensor]]:
    """Spec and diffusers' names of a file in FLUX.2's own naming, as ComfyUI's `flux2-vae.safetensors`.

    Raises:
        ValueError: not such a VAE.
    """
    if "encoder.down.0.block.0.conv1.weight" not in tensors or "bn.running_mean" not in tensors:
        raise ValueError(
            "these are not FLUX.2's VAE in its own naming (flux2-vae.safetensors); give diffusers' folder, which "
            "holds config.json and diffusion_pytorch_model.safetensors"
        )
    named = {_aside(name): tensor for name, tensor in tensors.items()}
    spec = _spec_of(named)
    levels = {"down_block_types": spec.block_channels, "up_block_types": spec.block_channels}  # whose number it reads
    counted = {name: tensor for name, tensor in named.items() if name.startswith("bn.")}
    return spec, convert_ldm_vae_checkpoint(named, levels) | counted


def _spec_of(named: Mapping[str, Tensor]) -> Flux2VAESpec:
    """The spec that the shapes tell."""
    levels = sum(bool(re.fullmatch(r"encoder\.down\.\d+\.block\.0\.conv1\.weight", name)) for name in named)
    blocks, decoder = (
        tuple(_width(named, f"{half}.{i}.block.0.conv1.weight") for i in range(levels))
        for half in ("encoder.down", "decoder.up")
    )
    return Flux2VAESpec(
        latent_channels=named["bn.running_mean"].shape[0] // PATCH**2,
        block_channels=blocks,
        decoder_channels=None if decoder == blocks else decoder,
        layers_per_block=sum(
            bool(re.fullmatch(r"encoder\.down\.0\.block\.\d+\.conv1\.weight", name)) for name in named
        ),
        middle_attention="encoder.mid.attn_1.q.weight" in named,
        quant_conv="quant_conv.weight" in named,
    )


def _width(named: Mapping[str, Tensor], name: str) -> int:
    if name not in named:
        raise ValueError(f"{name} is missing; copy the file again")
    return named[name].shape[0]


def _aside(name: str) -> str:
    """ComfyUI's file keeps the convolutions around the latents within encoder and decoder."""
    for prefix, plain in ASIDE.items():
        if name.startswith(prefix):
            return plain + name.removeprefix(prefix)
    return name
