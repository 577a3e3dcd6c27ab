"""Rectified flow: x_t = (1-t) x_0 + t noise and its velocity v = noise - x_0, for training and for sampling.

t = 1 is noise, t = 0 data. B batch; tensors of data are [B, ...], times [B] or one number.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, int], Tensor]
"""velocity(x [B, ...], t [B], step): dx/dt at x. `step` counts from 0; evaluations inside one solver step share it."""


def x_t(x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
    """Mixes data with noise at time t, in the dtype of `x0`."""
    t = _per_row(t, x0)
    return ((1 - t) * x0 + t * noise).to(x0.dtype)


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """Returns what the model learns to predict, the same at every t of a path."""
    return noise - x0


def x0_from_velocity(x: Tensor, velocity: Tensor, t: Tensor | float) -> Tensor:
    """Follows the velocity from time t straight to the data, as for a preview."""
    return (x - _per_row(t, x) * velocity).to(x.dtype)


def loss(velocity_pred: Tensor, x0: Tensor, noise: Tensor, weight: Tensor | None = None) -> Tensor:
    """Returns the mean squared error of the velocity in fp32; `weight`, [B] or broadcasting to the data, scales it."""
    error = (velocity_pred.float() - velocity_target(x0.float(), noise.float())).square()
    if weight is None:
        return error.mean()
    return (error * (_per_row(weight, error) if weight.ndim == 1 else weight)).mean()


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Moves times towards noise by t -> s t / (1 + (s-1) t); 0 and 1 stay, a shift of 1 changes nothing."""
    if not 0 < shift < math.inf:
        raise ValueError(f"shift must be a finite number above 0, got {shift}")
    return shift * t / (1 + (shift - 1) * t)


def size_shift(num_tokens: int, mu: tuple[float, float], tokens: tuple[int, int]) -> float:
    """Returns the shift exp(mu) for a picture of so many latent tokens: mu rises on the line through two points.

    Larger pictures keep more of their signal under the same noise, so they are given more steps near t = 1. The line
    is not cut off at its points (Krea 2 and FLUX.1 do not).
    """
    slope = (mu[1] - mu[0]) / (tokens[1] - tokens[0])
    return math.exp(mu[0] + slope * (num_tokens - tokens[0]))


def sample_times(
    num: int, *, mean: float = 0.0, std: float = 1.0, shift: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Draws [num] training times from a logit-normal, then shifts them; on the generator's device, else the CPU."""
    device = generator.device if generator else "cpu"
    return shift_time(torch.sigmoid(mean + std * torch.randn(num, generator=generator, device=device)), shift)


def timesteps(num_steps: int, shift: float = 1.0) -> Tensor:
    """Returns the num_steps + 1 edges of the solver's steps, falling from 1 to 0; even, then shifted once."""
    if not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1, got {num_steps!r}")
    return shift_time(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift).float()


def _per_row(t: Tensor | float, like: Tensor) -> Tensor:
    return torch.as_tensor(t, device=like.device).reshape(-1, *[1] * (like.ndim - 1))
