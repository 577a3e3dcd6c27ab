"""Frozen DiTs of other projects as `adapter.Host`: latents, time, tokens and mask → velocity, in our conventions.

Z-Image and FLUX.2 Klein are diffusers' classes, Boogu-Image its own package's; any callable of the same signature
serves as well.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..conditioning.profiles import PROFILES
from .adapter import Host


def z_image(transformer: nn.Module) -> Host:
    """diffusers' ZImageTransformer2DModel. It takes ragged rows, counts time from noise, and returns -v."""

    def velocity(latents: Tensor, t: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        rows = list(tokens) if mask is None else [row[kept] for row, kept in zip(tokens, mask, strict=True)]
        out = transformer(list(latents[:, :, None]), 1 - t, rows, return_dict=False)[0]
        return -torch.stack(list(out)).squeeze(2)

    return velocity


def klein(transformer: nn.Module) -> Host:
    """diffusers' Flux2Transformer2DModel without guidance, on latents [B, 128, h, w] that are patchified already.

    It reads no mask: rows are filled up with zeros, where its own pipeline has the states of padding.
    """

    def velocity(latents: Tensor, t: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        height, width = latents.shape[2:]
        if mask is not None:
            tokens = tokens * mask[..., None]
        out = transformer(
            hidden_states=latents.flatten(2).transpose(1, 2),
            encoder_hidden_states=tokens,
            timestep=t,
            img_ids=_places(len(latents), height, width, 1, latents.device),
            txt_ids=_places(len(latents), 1, 1, tokens.shape[1], latents.device),
            guidance=None,
            return_dict=False,
        )[0]
        return out.transpose(1, 2).unflatten(2, (height, width))

    return velocity


def boogu(transformer: nn.Module) -> Host:
    """Boogu-Image's own BooguImageTransformer2DModel. It counts its tokens by the mask and time from noise: -v."""
    config, embedder = transformer.config, transformer.rope_embedder
    rotary, places = embedder.get_freqs_cis(config.axes_dim_rope, config.axes_lens, embedder.theta), config.axes_lens

    def velocity(latents: Tensor, t: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        if tokens.shape[1] >= min(places):
            raise ValueError(
                f"a condition of {tokens.shape[1]} tokens: Boogu-Image has places for {min(places) - 1}; show it fewer "
                "--tiles of a picture"
            )
        return -transformer(latents, (1 - t).to(latents.dtype), tokens, rotary, mask, return_dict=False)

    return velocity


HOSTS: dict[str, Callable[[nn.Module], Host]] = {
    "z-image": z_image,
    "klein-4b": klein,
    "klein-9b": klein,
    "boogu": boogu,
    "boogu-edit": boogu,
}


def host_of(profile: str, transformer: nn.Module) -> Host:
    """The adapter's view of a transformer, which is frozen by it.

    Like its pipeline it computes in its own dtype, whatever autocast it is called in, and gets as many tokens as
    `condition_for` fills up to at inference.

    Raises:
        ValueError: no host of this profile is known.
    """
    if profile not in HOSTS:
        raise ValueError(f"no host is known for {profile!r}: expected {', '.join(HOSTS)}, or a callable of your own")
    velocity = HOSTS[profile](transformer.eval().requires_grad_(False))
    dtype = next(transformer.parameters()).dtype

    def host(latents: Tensor, t: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        missing = PROFILES[profile].pad_to - tokens.shape[1]
        if missing > 0:
            tokens = F.pad(tokens, (0, 0, 0, missing))
            mask = None if mask is None else F.pad(mask, (0, missing))
        with torch.autocast(latents.device.type, enabled=False):
            return velocity(latents.to(dtype), t, tokens.to(dtype), mask).float()

    return host


def _places(rows: int, height: int, width: int, length: int, device: torch.device) -> Tensor:
    """Coordinates [rows, tokens, 4] (time, row, column, token) of a grid or of a text."""
    axes = (torch.arange(1), torch.arange(height), torch.arange(width), torch.arange(length))
    return torch.cartesian_prod(*axes).expand(rows, -1, -1).to(device)
