"""Values per seed → intervals → whether the paper's direction holds; the rules are written down before a run.

A value is addressed as "row.metric". With values a and b of one seed drawn from the same data and cases, a - b is taken
seed by seed, and judged by the interval of those differences over the seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, Literal

from ..evaluation.report import Z, score

Verdict = Literal["holds", "does not hold", "undecided"]
Values = Mapping[str, Mapping[str, Sequence[Sequence[float]]]]
"""Row → metric → seed → values (one for each picture, or a single number)."""

# Student's t at 97.5 %, by degrees of freedom; beyond, the normal's.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)


@dataclass(frozen=True, kw_only=True)
class Above:
    """`better` is above `worse`, or at least no more than `margin` below it where one is given."""

    better: str
    worse: str
    margin: float = 0.0

    @property
    def says(self) -> str:
        less = f" - {self.margin:g}" if self.margin else ""
        return f"{self.better} > {self.worse}{less}"

    def judge(self, values: Values) -> dict[str, Any]:
        found = difference(values, self.better, self.worse)
        low, high = found["interval"] or (-math.inf, math.inf)
        return {**found, "verdict": _verdict(low > -self.margin, high < -self.margin)}


@dataclass(frozen=True, kw_only=True)
class Same:
    """Two values differ by no more than `margin`, either way."""

    one: str
    other: str
    margin: float

    @property
    def says(self) -> str:
        return f"|{self.one} - {self.other}| < {self.margin:g}"

    def judge(self, values: Values) -> dict[str, Any]:
        found = difference(values, self.one, self.other)
        low, high = found["interval"] or (-math.inf, math.inf)
        inside, outside = -self.margin < low and high < self.margin, low > self.margin or high < -self.margin
        return {**found, "verdict": _verdict(inside, outside)}


@dataclass(frozen=True, kw_only=True)
class Between:
    """A value lies within limits, each of which may be left open."""

    value: str
    low: float = -math.inf
    high: float = math.inf

    @property
    def says(self) -> str:
        if math.isinf(self.high):
            return f"{self.value} > {self.low:g}"
        if math.isinf(self.low):
            return f"{self.value} < {self.high:g}"
        return f"{self.low:g} <= {self.value} <= {self.high:g}"

    def judge(self, values: Values) -> dict[str, Any]:
        found = over_seeds(means(values, self.value))
        low, high = found["interval"] or (-math.inf, math.inf)
        return {
            **found,
            "pictures": None,
            "verdict": _verdict(self.low <= low and high <= self.high, high < self.low or low > self.high),
        }


Check = Above | Same | Between


def overall(verdicts: Sequence[Verdict]) -> Verdict:
    """What a claim of several parts comes to: it holds if all do, and does not if one does not."""
    if "does not hold" in verdicts:
        return "does not hold"
    return "holds" if verdicts and set(verdicts) == {"holds"} else "undecided"


def over_seeds(numbers: Sequence[float]) -> dict[str, Any]:
    """The mean of one number per seed and its 95 % t-interval; None for fewer than two seeds."""
    mean = fmean(numbers)
    if len(numbers) < 2:
        return {"mean": mean, "interval": None, "seeds": list(numbers)}
    half = student(len(numbers) - 1) * stdev(numbers) / math.sqrt(len(numbers))
    return {"mean": mean, "interval": [mean - half, mean + half], "seeds": list(numbers)}


def difference(values: Values, one: str, other: str) -> dict[str, Any]:
    """one - other: over seeds, and over pictures where both have the same ones."""
    firsts, seconds = means(values, one), means(values, other)
    found = over_seeds([a - b for a, b in zip(firsts, seconds, strict=True)])
    pairs = list(zip(lists(values, one), lists(values, other), strict=True))
    paired = all(len(a) == len(b) > 1 for a, b in pairs)
    found["pictures"] = _normal([x - y for a, b in pairs for x, y in zip(a, b, strict=True)]) if paired else None
    return found


def summary(values: Sequence[Sequence[float]]) -> dict[str, Any]:
    """One metric of one row: its interval over seeds, and that over all pictures of all seeds together."""
    pooled = [value for seed in values for value in seed]
    alone = all(len(seed) == 1 for seed in values)
    return {**over_seeds([fmean(seed) for seed in values]), "pictures": None if alone else score(pooled)}


def means(values: Values, address: str) -> list[float]:
    return [fmean(seed) for seed in lists(values, address)]


def lists(values: Values, address: str) -> Sequence[Sequence[float]]:
    """The values at "row.metric", per seed.

    Raises:
        ValueError: no such row or metric, or a seed without a value.
    """
    row, _, metric = address.partition(".")
    if row not in values or metric not in values[row]:
        known = ", ".join(f"{name}.{each}" for name, metrics in values.items() for each in metrics)
        raise ValueError(f"no value {address!r}; there are {known}")
    if not all(values[row][metric]):
        raise ValueError(f"{address}: a seed has no value; measure more pictures")
    return values[row][metric]


def student(freedom: int) -> float:
    """Student's t at 97.5 % for so many degrees of freedom, at least one."""
    return T[freedom - 1] if freedom <= len(T) else 1.96 + 2.5 / freedom


def _normal(numbers: Sequence[float]) -> dict[str, Any]:
    mean, half = fmean(numbers), Z * stdev(numbers) / math.sqrt(len(numbers))
    return {"mean": mean, "interval": [mean - half, mean + half], "n": len(numbers)}


def _verdict(yes: bool, no: bool) -> Verdict:
    return "holds" if yes else "does not hold" if no else "undecided"
