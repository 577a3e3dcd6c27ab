"""Images ↔ latents, by diffusers' AutoencoderKL."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F


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

    @property
    def compression(self) -> int:
        return self.unshuffle * 2 ** (len(self.block_channels) - 1)


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
        if latents.ndim != 4 or latents.shape[1] != self.spec.latent_channels:
            raise ValueError(
                f"latents of shape {tuple(latents.shape)} do not fit this VAE: it takes "
                f"[batch, {self.spec.latent_channels}, height, width]"
            )
        raw = latents * _channelwise(self.latent_std) + _channelwise(self.latent_mean)
        return (self.decode_raw(raw) * 0.5 + 0.5).clamp(0, 1)

    def _checked(self, images: Tensor) -> Tensor:
        factor = self.spec.compression
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % factor or images.shape[3] % factor:
            raise ValueError(
                f"images of shape {tuple(images.shape)} cannot be encoded: [batch, 3, height, width] with sides "
                f"divisible by {factor} is accepted"
            )
        return images


@torch.no_grad()
def preview_colors(vae: VAE, images: Tensor) -> tuple[tuple[float, float, float], ...]:
    """The linear map from latents to colours in -1..1 that fits these images best: C rows and a last one for none.

    Args:
        images: [B, 3, H, W] in 0..1, of the kind that will be drawn.
    """
    latents = vae.encode(images).movedim(1, -1).flatten(0, -2)
    colors = F.avg_pool2d(images * 2 - 1, vae.spec.compression).movedim(1, -1).flatten(0, -2)
    fit = torch.linalg.lstsq(F.pad(latents, (0, 1), value=1.0), colors).solution
    return tuple(tuple(round(value, 4) for value in row) for row in fit.tolist())


def _channelwise(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)
