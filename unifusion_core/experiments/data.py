"""What arms are trained on: samples by name, drawn from the micro-world's training split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from ..microworld.prompts import Prompt, sample_prompt
from ..training.micro_dit import EMPTY_SHARE, Group, Sample, edit_sample, picture_sample
from ..training.micro_vlm import Row

BATCH, NOISES = 32, 2  # conditions a step, and noise levels of each

Mix = tuple[tuple[str, float], ...]
"""Shares of a batch by name of `SAMPLES`."""


def described(rng: Random, **settings) -> Prompt:
    """A prompt that names everything but what no caption names, in any order and many wordings."""
    return sample_prompt(rng, "full", **settings)


def prompt_sample(rng: Random) -> Sample:
    """The user's own words condition the picture; or, rarely, nothing does."""
    prompt = described(rng)
    if rng.random() < EMPTY_SHARE:
        return Sample(row=Row(), keep="rewrite", target=prompt.scene)
    return Sample(row=Row(prompt=prompt.text), keep="prompt", target=prompt.scene)


def rewrite_sample(rng: Random) -> Sample:
    """The caption that follows the user's words conditions the picture; or, rarely, nothing does."""
    prompt = described(rng)
    if rng.random() < EMPTY_SHARE:
        return Sample(row=Row(), keep="rewrite", target=prompt.scene)
    return Sample(row=Row(prompt=prompt.text, target=prompt.scene), keep="rewrite", target=prompt.scene)


SAMPLES: dict[str, Callable[[Random], Sample]] = {
    "prompt": prompt_sample,
    "rewrite": rewrite_sample,
    "image": lambda rng: picture_sample(rng, "image"),
    "edit": edit_sample,
}


def batch(mix: Mix, seed: int, step: int) -> list[Group]:
    """One step's samples, a group for each name; they follow from mix, seed and step, whoever learns from them."""
    rng = Random(f"arms-{seed}-{step}")
    return [
        Group(tuple(SAMPLES[name](rng) for _ in range(count)), NOISES, rng.getrandbits(32))
        for name, count in _counts(mix, BATCH)
    ]


def _counts(mix: Mix, size: int) -> Sequence[tuple[str, int]]:
    """How many samples of each name make up the batch; the last takes what rounding leaves."""
    counts, left = [], size
    for name, share in mix[:-1]:
        counts.append((name, round(size * share)))
        left -= counts[-1][1]
    return [*counts, (mix[-1][0], left)]
