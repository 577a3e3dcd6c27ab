"""Images ↔ latents, by diffusers' AutoencoderKL for our own models and AutoencoderKLQwenImage for Krea 2.

FLUX.2's, for the large presets, is in `vae_flux2.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from torch import Tensor, nn
from torch.nn import functional as F

_QWEN_DEFAULTS = {
    name: tuple(parameter.default)
    for name, parameter in inspect.signature(AutoencoderKLQwenImage.__init__).parameters.items()
    if name.startswith("latents_")
}


@dataclass(frozen=True, kw_only=True)
class VAESpec:
    """An AutoencoderKL over pixel-unshuffled images.

    `unshuffle` folds u x u pixels into channels before the first convolution, so that no convolution runs at full
    resolution; the compression is `unshuffle · 2^(len(block_channels) - 1)`.
    """

    latent_channels: int = 8
    block_channels: tuple[int, ...] = (64, 96)
    layers_per_block: int = 1
    unshuffle: int = 4
    groups: int = 8
    middle_attention: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_channels", tuple(self.block_channels))

    @property
    def compression(self) -> int:
        return self.unshuffle * 2 ** (len(self.block_channels) - 1)

    @property
    def multiple(self) -> int:
        """What both sides of a picture must divide by."""
        return self.compression

    @property
    def decoder_values(self) -> int:
        """About as many numbers as decoding holds at once for a pixel: eight maps of the widest block."""
        return max(1, 8 * max(self.block_channels) // self.unshuffle**2)


class VAE(nn.Module):
    """Encodes images [B, 3, H, W] in 0..1 to latents [B, C, H/f, W/f] of about unit variance, and back."""

    def __init__(self, spec: VAESpec) -> None:
        super().__init__()
        self.spec = spec
        channels = 3 * spec.unshuffle**2
        blocks = len(spec.block_channels)
        self.autoencoder = AutoencoderKL(
            in_channels=channels,
            out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            block_out_channels=spec.block_channels,
            layers_per_block=spec.layers_per_block,
            latent_channels=spec.latent_channels,
            norm_num_groups=spec.groups,
            mid_block_add_attention=spec.middle_attention,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        self.register_buffer("latent_mean", torch.zeros(spec.latent_channels))
        self.register_buffer("latent_std", torch.ones(spec.latent_channels))

    def posterior(self, images: Tensor):
        """diffusers' diagonal Gaussian over raw latents, for training."""
        return self.autoencoder.encode(
            F.pixel_unshuffle(self._checked(images) * 2 - 1, self.spec.unshuffle)
        ).latent_dist

    def decode_raw(self, latents: Tensor) -> Tensor:
        """Images in -1..1, unclamped, from raw latents, for training."""
        return F.pixel_shuffle(self.autoencoder.decode(latents).sample, self.spec.unshuffle)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in 0..1 → latents, the posterior's mode; H and W must divide by the compression."""
        return (self.posterior(images).mode() - _channelwise(self.latent_mean)) / _channelwise(self.latent_std)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] → images [B, 3, h·f, w·f] in 0..1."""
        check_latents(latents, self.spec.latent_channels)
        raw = latents * _channelwise(self.latent_std) + _channelwise(self.latent_mean)
        return (self.decode_raw(raw) * 0.5 + 0.5).clamp(0, 1)

    def _checked(self, images: Tensor) -> Tensor:
        return check_images(images, self.spec.multiple)


@dataclass(frozen=True, kw_only=True)
class QwenImageVAESpec:
    """An AutoencoderKLQwenImage, Wan 2.1's architecture with Qwen-Image's weights, used on single pictures.

    downsample_time: of each halving of the sides, whether it would halve the frames of a video too. latent_mean and
    latent_std: of the raw latents, per channel; by default the numbers that belong to the public weights.
    """

    base_channels: int = 96
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks_per_level: int = 2
    downsample_time: tuple[bool, ...] = (False, True, True)
    latent_channels: int = 16
    latent_mean: tuple[float, ...] = _QWEN_DEFAULTS["latents_mean"]
    latent_std: tuple[float, ...] = _QWEN_DEFAULTS["latents_std"]

    def __post_init__(self) -> None:
        for name in ("multipliers", "downsample_time", "latent_mean", "latent_std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not len(self.latent_mean) == len(self.latent_std) == self.latent_channels:
            raise ValueError(
                f"{self.latent_channels} latent channels with {len(self.latent_mean)} means and {len(self.latent_std)} "
                "deviations; Qwen-Image's VAE has 16 of each"
            )

    @property
    def compression(self) -> int:
        return 2 ** len(self.downsample_time)

    @property
    def multiple(self) -> int:
        """What both sides of a picture must divide by."""
        return self.compression

    @property
    def decoder_values(self) -> int:
        """About as many numbers as decoding holds at once for a pixel, as ComfyUI counts them for this VAE: 2200."""
        return 23 * self.base_channels


class QwenImageVAE(nn.Module):
    """`VAE`'s encode and decode by diffusers' AutoencoderKLQwenImage: a picture is a video of one frame."""

    def __init__(self, spec: QwenImageVAESpec) -> None:
        super().__init__()
        self.spec = spec
        self.autoencoder = AutoencoderKLQwenImage(
            base_dim=spec.base_channels,
            z_dim=spec.latent_channels,
            dim_mult=list(spec.multipliers),
            num_res_blocks=spec.blocks_per_level,
            temperal_downsample=list(spec.downsample_time),
            latents_mean=list(spec.latent_mean),
            latents_std=list(spec.latent_std),
        )
        self.register_buffer("latent_mean", torch.tensor(spec.latent_mean, device="cpu"), persistent=False)
        self.register_buffer("latent_std", torch.tensor(spec.latent_std, device="cpu"), persistent=False)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in 0..1 → latents [B, C, H/f, W/f], the posterior's mode; H and W must divide by f."""
        frames = (check_images(images, self.spec.multiple) * 2 - 1)[:, :, None]
        raw = self.autoencoder.encode(frames.to(self.autoencoder.dtype)).latent_dist.mode()[:, :, 0]
        return (raw - _channelwise(self.latent_mean)) / _channelwise(self.latent_std)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] → images [B, 3, h·f, w·f] in 0..1."""
        check_latents(latents, self.spec.latent_channels)
        raw = latents * _channelwise(self.latent_std) + _channelwise(self.latent_mean)
        frames = self.autoencoder.decode(raw[:, :, None].to(self.autoencoder.dtype)).sample
        return (frames[:, :, 0].float() * 0.5 + 0.5).clamp(0, 1)


def qwen_image_spec(config: Mapping[str, Any]) -> QwenImageVAESpec:
    """The spec that diffusers' `vae/config.json` describes.

    Raises:
        ValueError: another class, or options that the public VAE does not use.
    """
    if (name := config.get("_class_name")) != AutoencoderKLQwenImage.__name__:
        raise ValueError(f"a VAE of class {name!r}: Krea 2 uses {AutoencoderKLQwenImage.__name__}")
    known = {"base_channels": "base_dim", "multipliers": "dim_mult", "blocks_per_level": "num_res_blocks"}
    known |= {"downsample_time": "temperal_downsample", "latent_channels": "z_dim"}
    known |= {"latent_mean": "latents_mean", "latent_std": "latents_std"}
    fixed = {"attn_scales": [], "dropout": 0.0, "input_channels": 3}
    if odd := {key: config[key] for key, value in fixed.items() if config.get(key, value) != value}:
        raise ValueError(f"a VAE with {odd}: only Qwen-Image's own {fixed} is supported")
    return QwenImageVAESpec(**{ours: config[theirs] for ours, theirs in known.items() if theirs in config})


def from_wan(tensors: Mapping[str, Tensor]) -> tuple[QwenImageVAESpec, dict[str, Tensor]]:
    """Spec and diffusers' names of a file in Wan's own naming, such as ComfyUI's `qwen_image_vae.safetensors`.

    Raises:
        ValueError: not such a VAE.
    """
    first, last = tensors.get("encoder.conv1.weight"), tensors.get("conv2.weight")
    if first is None or last is None or "decoder.middle.0.residual.0.gamma" not in tensors:
        raise ValueError("these are not the tensors of Qwen-Image's VAE; load qwen_image_vae.safetensors")
    if "decoder.upsamples.0.upsamples.0.residual.2.weight" in tensors:
        raise ValueError("this is Wan 2.2's VAE of 48 channels; Krea 2 uses qwen_image_vae.safetensors")
    if first.shape[1] != 3:
        raise ValueError(f"this VAE reads {first.shape[1]} channels; Krea 2's reads 3: load qwen_image_vae.safetensors")
    return (
        QwenImageVAESpec(base_channels=first.shape[0], latent_channels=last.shape[0]),
        convert_wan_vae_to_diffusers(dict(tensors)),
    )


@torch.no_grad()
def preview_colors(vae: nn.Module, images: Tensor) -> tuple[tuple[float, float, float], ...]:
    """The linear map from latents to colours in -1..1 that fits these images best: C rows and a last one for none.

    Args:
        images: [B, 3, H, W] in 0..1, of the kind that will be drawn.
    """
    encoded = [vae.encode(image[None]).float().cpu() for image in images]  # one by one: a large VAE fills a card
    latents = torch.cat(encoded).movedim(1, -1).flatten(0, -2)
    colors = F.avg_pool2d(images.float().cpu() * 2 - 1, vae.spec.compression).movedim(1, -1).flatten(0, -2)
    fit = torch.linalg.lstsq(F.pad(latents, (0, 1), value=1.0), colors).solution
    return tuple(tuple(round(value, 4) for value in row) for row in fit.tolist())


def _channelwise(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


def check_latents(latents: Tensor, channels: int, multiple: int = 1) -> None:
    """Raises ValueError unless latents are [B, channels, h, w], with sides that divide by `multiple`."""
    if latents.ndim != 4 or latents.shape[1] != channels or any(side % multiple for side in latents.shape[2:]):
        sides = f" with sides divisible by {multiple}" if multiple > 1 else ""
        raise ValueError(
            f"latents of shape {tuple(latents.shape)} do not fit this VAE: it takes [batch, {channels}, height, "
            f"width]{sides}"
        )


def check_images(images: Tensor, factor: int) -> Tensor:
    """The images; raises ValueError unless they are [B, 3, H, W] with sides that divide by `factor`."""
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % factor or images.shape[3] % factor:
        raise ValueError(
            f"images of shape {tuple(images.shape)} cannot be encoded: [batch, 3, height, width] with sides "
            f"divisible by {factor} is accepted"
        )
    return images
