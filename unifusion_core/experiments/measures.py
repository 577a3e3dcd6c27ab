"""Measures by name: what is taken of a model for one seed, and how many 64-px pictures it draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..pipeline import UniFusion
from . import measure_layers, measure_pictures, measure_text
from .measured import Measured


@dataclass(frozen=True)
class Measure:
    """take: (model, seed, cases) → `Measured`. pictures: 64-px pictures drawn for each case, for the estimated time."""

    take: Callable[[UniFusion, int, int], Measured]
    pictures: float


MEASURES: dict[str, Measure] = {
    "prompts": Measure(measure_text.prompts, 1),
    "rewrites": Measure(measure_text.rewrites, 1.3),
    "late": Measure(measure_text.late, 1),
    "kinds, own words": Measure(measure_text.kinds_own_words, 2.5),
    "kinds, rewritten": Measure(measure_text.kinds_rewritten, 3.3),
    "image to image": Measure(measure_pictures.image_to_image, 2),
    "edits by share": Measure(measure_pictures.edits_by_share, 10),
    "edits": Measure(measure_pictures.edits, 1.5),
    "compositions": Measure(measure_pictures.compositions, 3),
    "tiles": Measure(measure_pictures.tiles, 6),
    "similarity": Measure(measure_layers.similarity, 0.2),
    "pooling weights": Measure(measure_layers.pooling_weights, 0),
    "dropout": Measure(measure_layers.dropout, 5),
}
