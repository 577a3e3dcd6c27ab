"""Noise in, latents out: solvers of dx/dt = velocity(x, t, step) from t = 1 down to t = 0.

A solver knows nothing of prompts: guidance and schedule are closures around `velocity` (see `flow.Velocity`).
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from .flow import Velocity

Callback = Callable[[int, Tensor, float], None]
"""callback(step, x, t): called after each step with the state it reached; what it raises ends the sampling."""


def initial_noise(
    shape: tuple[int, ...], seed: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    """Draws the noise that a seed stands for, the same on every device.

    Row i of the batch uses seed + i (modulo 2^64), so it equals the single picture made with that seed.
    """
    rows = [
        torch.randn(shape[1:], generator=torch.Generator().manual_seed((seed + row) % 2**64)) for row in range(shape[0])
    ]
    return torch.stack(rows).to(device=device, dtype=dtype)


def guided(conditional: Velocity, unconditional: Velocity | None, scale: float) -> Velocity:
    """Returns classifier-free guidance, u + scale (c - u), as two separate forwards; at scale 1 only c is called.

    Two forwards instead of one batch: neither condition is padded to the length of the other.

    Raises:
        ValueError: scale is not finite, or differs from 1 without an unconditional velocity.
    """
    if not math.isfinite(scale):
        raise ValueError(f"guidance scale must be a finite number, got {scale}")
    if scale == 1:
        return conditional
    if unconditional is None:
        raise ValueError(f"guidance scale {scale} needs an unconditional velocity; without one only 1 is accepted")

    def velocity(x: Tensor, t: Tensor, step: int) -> Tensor:
        base = unconditional(x, t, step)
        return base + scale * (conditional(x, t, step) - base)

    return velocity


@torch.no_grad()
def sample_euler(velocity: Velocity, x: Tensor, timesteps: Tensor, callback: Callback | None = None) -> Tensor:
    """Solves with Euler's method: first order, one forward per step; `timesteps` [steps + 1] falls, as from `flow`."""
    for step, t, t_next in _steps(timesteps):
        x = x + (t_next - t) * velocity(x, _rows(t, x), step)
        if callback:
            callback(step, x, t_next.item())
    return x


@torch.no_grad()
def sample_heun(velocity: Velocity, x: Tensor, timesteps: Tensor, callback: Callback | None = None) -> Tensor:
    """Solves with Heun's method: second order, two forwards per step, one on a step that ends at t = 0.

    The second forward, at the next t, carries the number of the step it corrects: a schedule never switches within one.
    The last step is Euler's, as in Algorithm 1 of Karras et al. (2022); the order stays two.
    """
    for step, t, t_next in _steps(timesteps):
        slope = velocity(x, _rows(t, x), step)
        if t_next > 0:
            ahead = x + (t_next - t) * slope
            slope = (slope + velocity(ahead, _rows(t_next, x), step)) / 2
        x = x + (t_next - t) * slope
        if callback:
            callback(step, x, t_next.item())
    return x


def _steps(timesteps: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    timesteps = timesteps.cpu()  # scalars on the host mix with tensors of any device, and never wait for it
    if timesteps.ndim != 1 or len(timesteps) < 2 or not (timesteps.diff() < 0).all():
        raise ValueError(f"timesteps must be at least 2 falling values (1 step), got {timesteps.tolist()}")
    for step, (t, t_next) in enumerate(pairwise(timesteps)):
        yield step, t, t_next


def _rows(t: Tensor, x: Tensor) -> Tensor:
    return torch.full((len(x),), t.item(), device=x.device, dtype=t.dtype)  # not in x's dtype: bf16 rounds times away
