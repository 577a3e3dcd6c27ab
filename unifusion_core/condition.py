"""What crosses from conditioning to diffusion: one sequence of condition tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """Tokens that enter the DiT's sequence, before the DiT's own text projection.

    Attributes:
        tokens: [B, T, E] float.
        mask: [B, T] bool, True where a real token stands; None when all are real.
        positions: [B, T, 3] float (is_image, y, x), the centre of an image token as a fraction of its source image;
            text tokens are zero. None when all are zero.
    """

    tokens: Tensor
    mask: Tensor | None = None
    positions: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]


def stack(conditions: list[Condition]) -> Condition:
    """Puts conditions of any lengths into one batch, right-padded with a mask."""
    lengths = [c.tokens.shape[1] for c in conditions for _ in range(len(c))]
    longest = max(lengths)

    def pad(x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros(x.shape[0], longest - x.shape[1], *x.shape[2:])], dim=1)

    return Condition(
        torch.cat([pad(c.tokens) for c in conditions]),
        torch.cat([pad(_mask(c)) for c in conditions])
        if len(set(lengths)) > 1 or any(c.mask is not None for c in conditions)
        else None,
        None if all(c.positions is None for c in conditions) else torch.cat([pad(_positions(c)) for c in conditions]),
    )


def _mask(condition: Condition) -> Tensor:
    if condition.mask is not None:
        return condition.mask
    return torch.ones(condition.tokens.shape[:2], dtype=torch.bool, device=condition.tokens.device)


def _positions(condition: Condition) -> Tensor:
    if condition.positions is not None:
        return condition.positions
    return torch.zeros(*condition.tokens.shape[:2], 3, device=condition.tokens.device)
