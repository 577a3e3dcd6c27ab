"""A judged claim → its plot and its contact sheet, for those who would rather look."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from ..evaluation.charts import (
    FADED,
    INK,
    LABEL,
    SCALE,
    SMALL,
    TITLE,
    WIDTH,
    Canvas,
    Color,
    Dots,
    Marker,
    Panel,
    Series,
    dot_chart,
    length,
    line_chart,
)
from .claim import Claim, Curve
from .measured import Measured

LOOKS: tuple[tuple[Color, Marker], ...] = (
    ((3, 112, 135), "circle"),
    ((225, 121, 27), "square"),
    ((27, 146, 71), "diamond"),
    ((199, 72, 120), "up"),
    ((143, 120, 186), "down"),
)
CELL, GAP, MARGIN = 112, 10, 24  # px, of a contact sheet
NAMES = 150  # px for the names of its rows
LINE, LINES = 16, 4  # px and number of lines over a picture
NOTE = "Diamond and bar: mean and 95 % interval over seeds (Student's t). Dots: the seeds."


def plot(claim: Claim, judged: Mapping[str, Any]) -> Image.Image:
    """Draws a claim's metrics as dots with intervals, and its curves below."""
    rows = judged["rows"]
    panels = []
    for metric in claim.shown:
        found = {name: row["metrics"][metric] for name, row in rows.items() if metric in row["metrics"]}
        if found:
            panels.append(Panel(metric, [_dots(name, value) for name, value in found.items()]))
    charts = [dot_chart(panels, title=f"{claim.name} ({claim.where}): {judged['verdict']}", note=NOTE)]
    charts += [_curve(curve, rows) for curve in claim.curves]
    return _stacked(charts)


def sheet(claim: Claim, found: Mapping[str, Measured]) -> Image.Image | None:
    """Lays out the pictures of one seed: a line for each row and label, a column for each case; None without any.

    Rows of other cases stand apart, under titles of their own.

    Args:
        found: results by name of a row.
    """
    cases: dict[tuple[str, ...], dict[str, Measured]] = {}
    for name, each in found.items():
        if each.pictures:
            cases.setdefault(tuple(each.titles), {})[name] = each
    return _stacked([_cases(claim, titles, rows) for titles, rows in cases.items()]) if cases else None


def _cases(claim: Claim, titled: Sequence[str], found: Mapping[str, Measured]) -> Image.Image:
    """The part of a sheet whose rows show the same cases."""
    lines = _once([(name, label, kept) for name, each in found.items() for label, kept in each.pictures.items()])
    side = max(CELL, max(picture.width for *_, kept in lines for picture in kept))
    columns = min(max(len(kept) for *_, kept in lines), (WIDTH - NAMES - 2 * MARGIN) // (side + GAP))
    titles = [_wrapped(title, side) for title in titled[:columns]]
    head = 52 + (LINE * LINES + 8 if titles else 0)
    canvas = Canvas(head + len(lines) * (side + GAP) + MARGIN)
    canvas.text(MARGIN, 34, f"{claim.name} ({claim.where})", TITLE)
    for column, words in enumerate(titles):
        for number, line in enumerate(words):
            canvas.text(_left(column, side), 62 + LINE * number, line, SMALL, FADED)
    for number, (name, label, kept) in enumerate(lines):
        top = head + number * (side + GAP)
        for place, line in enumerate([*_wrapped(name, NAMES - 10), *_wrapped(label, NAMES - 10)]):
            color = INK if place < len(_wrapped(name, NAMES - 10)) else FADED
            canvas.text(MARGIN, top + side / 2 - 4 + LINE * place, line, LABEL - 2, color)
        for column, picture in enumerate(kept[:columns]):
            large = picture.resize((side * SCALE, side * SCALE), Image.Resampling.NEAREST)
            canvas.image.paste(large, (round(_left(column, side) * SCALE), round(top * SCALE)))
    return canvas.finish()


def _once(lines: list[tuple[str, str, list[Image.Image]]]) -> list[tuple[str, str, list[Image.Image]]]:
    """Sources, which all rows share, on top and only for the first row."""
    shared = {label for _, label, _ in lines if label in ("source", "image one", "image two")}
    first = {label: next(line for line in lines if line[1] == label) for label in sorted(shared)}
    sources = [("", label, kept) for label, (_, _, kept) in first.items()]
    return [*sources, *(line for line in lines if line[1] not in shared)]


def _dots(name: str, value: Mapping[str, Any]) -> Dots:
    interval = value["interval"]
    return Dots(name, value["mean"], tuple(interval) if interval else None, value["seeds"])


def _curve(curve: Curve, rows: Mapping[str, Any]) -> Image.Image:
    series = []
    for (name, (row, pattern)), (color, marker) in zip(curve.lines.items(), LOOKS, strict=False):
        found = [rows[row]["metrics"].get(pattern.format(point)) for point in curve.points]
        spread = [tuple(value["interval"]) if value and value["interval"] else None for value in found]
        series.append(Series(name, [value["mean"] if value else math.nan for value in found], color, marker, spread))
    labels = {"title": curve.title, "x_label": curve.x_label, "y_label": curve.y_label}
    return line_chart(series, curve.points, **labels, low=curve.low, note="Bars: 95 % interval over seeds.")


def _stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    whole = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), (255, 255, 255))
    top = 0
    for picture in pictures:
        whole.paste(picture, (0, top))
        top += picture.height
    return whole


def _left(column: int, side: int) -> int:
    return MARGIN + NAMES + column * (side + GAP)


def _wrapped(text: str, width: float) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and length(f"{lines[-1]} {word}", SMALL) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines if len(lines) <= LINES else [*lines[: LINES - 1], f"{lines[LINES - 1]} ..."]
