"""What a claim of the paper is here: a statement, the models it is about, what is taken of them, and a rule.

The rule is written down before a run; `verdict` says how it is judged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .arms import Arm
from .verdict import Check

Shipped = Literal["micro", "micro-base"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a claim's table: a trained arm, or a shipped model by its name, and the measure taken of it."""

    name: str
    of: Arm | Shipped
    by: str


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A chart over `points`: by name of a line its row and the pattern of its metrics, whose {} takes the point."""

    title: str
    x_label: str
    y_label: str
    points: tuple[str, ...]
    lines: Mapping[str, tuple[str, str]]
    low: float | None = None


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim of the paper.

    where, says: its place and what it states. shown: the metrics of the table and the plot. curves: further charts.
    notes: where we depart, and what else to know when reading the numbers.
    """

    name: str
    where: str
    says: str
    rows: tuple[Row, ...]
    checks: tuple[Check, ...]
    shown: tuple[str, ...]
    curves: tuple[Curve, ...] = ()
    notes: str = ""

    @property
    def arms(self) -> tuple[Arm, ...]:
        return tuple(dict.fromkeys(row.of for row in self.rows if isinstance(row.of, Arm)))
