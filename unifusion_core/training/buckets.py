"""Which samples make up which batch: aspect-ratio buckets, shuffled by seed and epoch, found from the step alone."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

WIDEST = 2.0  # of the buckets' aspect ratios; a wider picture is cropped
STEPS_A_SIDE = 16  # sides of buckets differ by a sixteenth of the square's, or by what the model needs if that is more


@dataclass(frozen=True)
class Batch:
    """One step's samples, by index, all drawn at one size (width, height)."""

    size: tuple[int, int]
    indices: tuple[int, ...]


def bucket_sizes(side: int, multiple: int) -> tuple[tuple[int, int], ...]:
    """Sizes of about side² px whose sides divide by `multiple`.

    Raises:
        ValueError: the side does not divide by `multiple`.
    """
    if side < multiple or side % multiple:
        raise ValueError(f"--size {side}: the model draws sides that are multiples of {multiple}")
    step = multiple * max(1, round(side / STEPS_A_SIDE / multiple))
    sizes = {(side, side)}
    for width in range(step, side + 1, step):
        height = round(side * side / width / step) * step
        if height <= WIDEST * width:
            sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))


def nearest(size: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The bucket of the nearest aspect ratio."""
    ratio = math.log(size[0] / size[1])
    return min(sizes, key=lambda each: (abs(math.log(each[0] / each[1]) - ratio), each))


class Order:
    """The batches of every epoch. A bucket's last batch is filled up with its first samples, so none is left out."""

    def __init__(self, sizes: Sequence[tuple[int, int]], buckets: Sequence[tuple[int, int]], batch: int, seed: int):
        members: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, size in enumerate(sizes):
            members[nearest(size, buckets)].append(index)
        self.members = dict(sorted(members.items()))
        self.batch, self.seed = batch, seed
        self.steps_per_epoch = sum(math.ceil(len(each) / batch) for each in self.members.values())

    def at(self, step: int) -> Batch:
        epoch, within = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[within]

    def after(self, index: int, size: tuple[int, int]) -> int:
        """The sample of the same bucket that stands in for one that cannot be read."""
        members = self.members[size]
        return members[(members.index(index) + 1) % len(members)]

    @lru_cache(maxsize=2)  # noqa: B019 (an order lives as long as its run)
    def _epoch(self, epoch: int) -> list[Batch]:
        rng, batches = Random(f"epoch-{self.seed}-{epoch}"), []
        for size, members in self.members.items():
            mixed = rng.sample(members, len(members))
            for start in range(0, len(mixed), self.batch):
                chosen = mixed[start : start + self.batch]
                chosen += [mixed[i % len(mixed)] for i in range(self.batch - len(chosen))]
                batches.append(Batch(size, tuple(chosen)))
        rng.shuffle(batches)
        return batches
