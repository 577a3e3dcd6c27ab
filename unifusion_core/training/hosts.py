"""Frozen DiTs of diffusers as `adapter.Host`: latents, time, tokens and mask → velocity, in our conventions.

Boogu-Image comes first in intent, but diffusers 0.42 has no class for it: any callable of the same signature serves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .adapter import Host


def z_image(transformer: nn.Module) -> Host:
    """diffusers' ZImageTransformer2DModel. It takes ragged rows, counts time from noise, and returns -v."""
    transformer.eval().requires_grad_(False)

    def velocity(latents: Tensor, t: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        rows = list(tokens) if mask is None else [row[kept] for row, kept in zip(tokens, mask, strict=True)]
        out = transformer(list(latents[:, :, None]), 1 - t, rows, return_dict=False)[0]
        return -torch.stack(list(out)).squeeze(2)

    return velocity


def klein(transformer: nn.Module) -> Host:
    """diffusers' Flux2Transformer2DModel without guidance, on latents [B, 128, h, w] that are patchified already.

    It reads no mask: rows are filled up with zeros, where its own pipeline has the states of padding.
    """
    transformer.eval().requires_grad_(False)

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


HOSTS: dict[str, Callable[[nn.Module], Host]] = {"z-image": z_image, "klein-4b": klein, "klein-9b": klein}


def host_of(profile: str, transformer: nn.Module) -> Host:
    """The adapter's view of a diffusers transformer.

    Raises:
        ValueError: no host of this profile is known.
    """
    if profile not in HOSTS:
        raise ValueError(f"no host is known for {profile!r}: expected {', '.join(HOSTS)}, or a callable of your own")
    return HOSTS[profile](transformer)


def _places(rows: int, height: int, width: int, length: int, device: torch.device) -> Tensor:
    """Coordinates [rows, tokens, 4] (time, row, column, token) of a grid or of a text."""
    axes = (torch.arange(1), torch.arange(height), torch.arange(width), torch.arange(length))
    return torch.cartesian_prod(*axes).expand(rows, -1, -1).to(device)
