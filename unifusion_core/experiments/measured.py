"""What measuring a model for one seed gives: numbers by name, and some of the pictures they come from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from statistics import fmean
from typing import TypeVar

from PIL import Image

from ..evaluation.micro import Run

SHOWN = 6  # pictures of each kind that are kept to look at
ATTRIBUTES = ("shape", "color", "size", "position", "count", "background")

Case = TypeVar("Case")


@dataclass
class Measured:
    """Values by metric: one for each picture, or a single one for all; pictures by label, and titles of their cases."""

    values: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    pictures: dict[str, list[Image.Image]] = field(default_factory=dict)
    titles: list[str] = field(default_factory=list)

    def add(self, found: dict[str, list[float]], prefix: str = "") -> None:
        for name, values in found.items():
            self.values[prefix + name] += [float(value) for value in values]

    def mean(self, name: str) -> float:
        return fmean(self.values[name])

    def show(self, label: str, pictures: Sequence[Image.Image]) -> None:
        """Keeps the first `SHOWN` pictures of a label."""
        kept = self.pictures.setdefault(label, [])
        kept += pictures[: SHOWN - len(kept)]

    def entitle(self, titles: Sequence[str]) -> None:
        self.titles += titles[: SHOWN - len(self.titles)]


def held_out(
    part: str, make: Callable[[Random, int, bool], Case], seed: int, num: int
) -> Iterator[tuple[list[Case], int]]:
    """Batches of `num` held-out cases with the noise of their first; as `evaluation.micro.Run.batches`."""
    for cases, _, noise in Run(seeds=(seed,)).batches(part, make, num):
        yield cases, noise


def following(scores: dict[str, list[float]]) -> dict[str, list[float]]:
    """The oracle's scores of pictures, and `following`: the mean of those of a picture's attributes."""
    return {"following": [fmean(each) for each in zip(*(scores[name] for name in ATTRIBUTES), strict=True)], **scores}
