"""Averages over prompts with bootstrap intervals: whole prompts are drawn again, with all their pictures and questions.

P prompts, U units (all questions, or those of one category), R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 2000
CHUNK = 100  # resamples at once

Cell = tuple[float, float]
"""Sum of values, and how many."""


@dataclass(frozen=True, eq=False)
class Table:
    """What each prompt adds to each unit: sums and counts [P, U]. A unit's average is its sum over its count."""

    units: tuple[str, ...]
    sums: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Cell]]) -> Table:
        """From one mapping of unit → (sum, count) for each prompt."""
        units = tuple(dict.fromkeys(unit for row in rows for unit in row))
        cells = np.array([[row.get(unit, (0.0, 0.0)) for unit in units] for row in rows], dtype=float)
        cells = cells.reshape(len(rows), len(units), 2)
        return cls(units, cells[..., 0], cells[..., 1])

    def averages(self) -> np.ndarray:
        """[U]; NaN for a unit without values."""
        return _ratio(self.sums.sum(0), self.counts.sum(0))

    def resampled(self, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
        """[R, U]: the averages of as many prompts, drawn with replacement."""
        rng, prompts = np.random.default_rng(seed), len(self.sums)
        found = []
        for start in range(0, resamples, CHUNK):
            times = rng.multinomial(prompts, np.full(prompts, 1 / prompts), min(CHUNK, resamples - start))
            found.append(_ratio(times @ self.sums, times @ self.counts))
        return np.concatenate(found)

    def scores(
        self, means_of: Mapping[str, Sequence[str]] | None = None, *, seed: int = 0
    ) -> dict[str, dict[str, Any]]:
        """Scores (`report.score`) of every unit, and of each mean over several units (a macro average).

        Intervals are the 2.5 and 97.5 % quantiles of the resamples; n counts the prompts that have a value.
        """
        values, drawn = self.averages(), self.resampled(seed)
        found = {
            unit: _score(values[i], drawn[:, i], int((self.counts[:, i] > 0).sum()))
            for i, unit in enumerate(self.units)
        }
        for name, units in means_of.items():
            at = [self.units.index(unit) for unit in units]
            present = int((self.counts[:, at].sum(1) > 0).sum())
            found[name] = _score(_mean(values[at]), _mean(drawn[:, at]), present)
        return found


def _ratio(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.divide(sums, counts, out=np.full(np.shape(sums), np.nan), where=counts > 0)


def _mean(values: np.ndarray) -> np.ndarray:
    """Over the last axis, of what is no NaN."""
    known = ~np.isnan(values)
    return _ratio(np.where(known, values, 0).sum(-1), known.sum(-1))


def _score(value: float, drawn: np.ndarray, count: int) -> dict[str, Any]:
    if not count or np.isnan(value):
        return {"mean": None, "interval": None, "n": 0}
    low, high = np.nanquantile(drawn, (0.025, 0.975))
    return {"mean": float(value), "interval": [float(low), float(high)], "n": count}
