"""Recipe `micro-vae`: the micro-world's autoencoder, on scenes filled with shapes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..diffusion.vae import VAE, VAESpec
from ..microworld.render import render_array
from ..microworld.scene import sample_scene
from .loop import LoopSpec, fit

SPEC = VAESpec()
LOOP = LoopSpec(steps=4500, batch_size=16, rate=2e-3, warmup=100, decay_fraction=0.5, weight_decay=0.0, ema_decay=0.999)
DECODER = replace(LOOP, steps=4000, rate=1e-3, decay_fraction=0.7)
FOREGROUND_WEIGHT = 5.0
KL_WEIGHT = 1e-5


def batch(step: int, seed: int, *, size: int) -> Tensor:
    """[B, 6, 64, 64]: images in 0..1 beside their backgrounds, from which the loss knows where shapes are."""
    rng = Random(f"vae-{seed}-{step}")
    pairs = []
    for _ in range(size):
        scene = sample_scene(rng, count=rng.choice((2, 3, 4)), held_out=None)
        image = render_array(scene)
        pairs.append(np.concatenate([image, np.broadcast_to(image[:1, :1], image.shape)], axis=-1))
    return torch.from_numpy(np.stack(pairs)).permute(0, 3, 1, 2).float() / 255


def pictures(rng: Random, count: int) -> Tensor:
    """Scenes of the default canvas, [count, 3, 64, 64] in 0..1."""
    images = np.stack([render_array(sample_scene(rng)) for _ in range(count)])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def loss(model: nn.Module, pairs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted L1 + 2·MSE over pixels in -1..1, and a small KL term; shapes weigh more than background."""
    images, background = pairs[:, :3], pairs[:, 3:]
    foreground = ((images - background).abs().amax(1, keepdim=True) > 0.02).float()
    weight = 1 + FOREGROUND_WEIGHT * F.max_pool2d(foreground, 3, stride=1, padding=1)
    posterior = model.posterior(images)
    error = model.decode_raw(posterior.sample()) - (images * 2 - 1)
    pixel = (weight * (error.abs() + 2 * error.square())).mean()
    kl = posterior.kl().mean() / images[0].numel()
    return pixel + KL_WEIGHT * posterior.kl().mean(), {"mse": error.square().mean() / 4, "kl": kl}


def train(folder: Path, *, loop: LoopSpec = LOOP, device: str | None = None) -> VAE:
    """Trains the VAE and measures its latents' mean and deviation, per channel, over 512 scenes."""
    model = VAE(SPEC)
    fit(model, loss, _batches(loop), loop, folder, device=device)
    with torch.no_grad():
        latents = torch.cat([model.posterior(batch(-1 - i, loop.seed, size=64)[:, :3]).mode() for i in range(8)])
    model.latent_mean.copy_(latents.mean((0, 2, 3)))
    model.latent_std.copy_(latents.std((0, 2, 3)))
    return model


def sharpen(model: VAE, folder: Path, *, loop: LoopSpec = DECODER, device: str | None = None) -> VAE:
    """Trains the decoder alone, so that latents, and what was trained on them, stay as they are."""
    model.autoencoder.encoder.requires_grad_(False)
    return fit(model, loss, _batches(replace(loop, seed=loop.seed + 1)), loop, folder, device=device)


def _batches(loop: LoopSpec):
    return lambda step, _, shard: batch(step, loop.seed, size=loop.batch_size)[shard[0] :: shard[1]]
