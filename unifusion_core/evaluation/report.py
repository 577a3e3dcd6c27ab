"""Values → scores with intervals → a plain-text table beside the targets.

A score is {"mean": x, "interval": [low, high], "n": n}, with 95 % intervals; a report is a nest of them, JSON-able.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

Z = 1.96  # of a 95 % interval
TARGETS = {
    "text_to_image.exact": 0.85,
    "text_to_image.shape": 0.95,
    "text_to_image.color": 0.95,
    "text_to_image.size": 0.95,
    "text_to_image.position": 0.95,
    "text_to_image.count": 0.95,
    "rewrite.exact": 0.95,
    "verifi.indirect.exact": 0.75,
    "edit.success": 0.80,
    "edit.preserved": 0.90,
}
RECONSTRUCTION_TARGETS = {"psnr": 28.0, "marks": 0.8}  # at the most tiles


def score(values: Iterable[float]) -> dict[str, Any]:
    """The mean of values with its 95 % interval: Wilson's where every value is 0 or 1, else the normal one.

    Values within 0..1 keep their interval there. Without values, mean and interval are None.
    """
    values = [float(value) for value in values]
    count = len(values)
    if not count:
        return {"mean": None, "interval": None, "n": 0}
    mean = fmean(values)
    if set(values) <= {0.0, 1.0}:
        interval = wilson(sum(values), count)
    else:
        half = Z * stdev(values) / math.sqrt(count) if count > 1 else 0.0
        interval = mean - half, mean + half
        if min(values) >= 0 and max(values) <= 1:
            interval = max(0.0, interval[0]), min(1.0, interval[1])
    return {"mean": mean, "interval": list(interval), "n": count}


def wilson(successes: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion."""
    share, square = successes / count, Z * Z / count
    middle = (share + square / 2) / (1 + square)
    half = Z * math.sqrt(share * (1 - share) / count + square / (4 * count)) / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)


def harmonic(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The harmonic mean of two scores in 0..1; its interval runs from that of the low ends to that of the high ends.

    That interval is a wide one: both scores would have to err to the same side. A score without values counts as 0.
    """
    ends = [first["interval"] or (0.0, 0.0), second["interval"] or (0.0, 0.0)]
    low, high = (_harmonic(one, other) for one, other in zip(*ends, strict=True))
    mean = _harmonic(first["mean"] or 0.0, second["mean"] or 0.0)
    return {"mean": mean, "interval": [low, high], "n": min(first["n"], second["n"])}


def nest(values: Mapping[tuple[str, ...], Sequence[float]]) -> dict[str, Any]:
    """Values under key paths → nested scores."""
    report: dict[str, Any] = {}
    for (*path, last), numbers in values.items():
        at = report
        for key in path:
            at = at.setdefault(key, {})
        at[last] = score(numbers)
    return report


def flatten(report: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested report → {"a.b.c": leaf} in order; a leaf is a score, or whatever is no mapping."""
    leaves: dict[str, Any] = {}
    for key, value in report.items():
        if isinstance(value, Mapping) and not is_score(value):
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def is_score(value: Any) -> bool:
    return isinstance(value, Mapping) and {"mean", "interval", "n"} <= value.keys()


def targets(report: Mapping[str, Any]) -> dict[str, float]:
    """Which leaves of this report have a target, and which: the mean should reach it."""
    found = dict(TARGETS)
    for prefix, part in (("", report), ("reconstruction.", report.get("reconstruction", {}))):
        if "tiles" in part:
            most = max(part["tiles"], key=int)
            found |= {f"{prefix}tiles.{most}.{name}": target for name, target in RECONSTRUCTION_TARGETS.items()}
    leaves = flatten(report)
    return {name: target for name, target in found.items() if name in leaves}


def table(report: Mapping[str, Any]) -> str:
    """All leaves as aligned plain text: scores with interval, n and target, then what is no score."""
    leaves, wanted = flatten(report), targets(report)
    rows = [("", "mean", "95 % interval", "n", "target", "")]
    for name, leaf in leaves.items():
        if is_score(leaf):
            target = wanted.get(name)
            rows.append((name, _number(leaf["mean"]), _interval(leaf), str(leaf["n"]), *_verdict(leaf, target)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        numbers = "  ".join(cell.rjust(width) for cell, width in zip(cells[:-1], widths[1:-1], strict=True))
        lines.append(f"{name.ljust(widths[0])}  {numbers}  {cells[-1]}".rstrip())
    others = {name: leaf for name, leaf in leaves.items() if not is_score(leaf)}
    width = max(map(len, others), default=0)
    notes = [f"{name.ljust(width)}  {_text(leaf)}" for name, leaf in others.items()]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _harmonic(one: float, other: float) -> float:
    return 2 * one * other / (one + other) if one + other > 0 else 0.0


def _verdict(leaf: Mapping[str, Any], target: float | None) -> tuple[str, str]:
    if target is None:
        return "", ""
    met = leaf["mean"] is not None and leaf["mean"] >= target
    return f">= {target:g}", "met" if met else "missed"


def _interval(leaf: Mapping[str, Any]) -> str:
    return f"{_number(leaf['interval'][0])} .. {_number(leaf['interval'][1])}" if leaf["interval"] else "-"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)
