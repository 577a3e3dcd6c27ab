"""Numbers → charts as PIL images 1024 px wide: bars, lines, dots, and heat maps of tokens × layers. Only Pillow.

Lengths are in px of the finished picture; a Canvas draws at twice that size for smooth edges.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]
Box = tuple[float, float, float, float]
Marker = Literal["circle", "square", "diamond", "up", "down"]

WIDTH, HEIGHT, SCALE = 1024, 576, 2
PAPER, INK, FADED, GRID = (255, 255, 255), (28, 30, 36), (96, 100, 108), (224, 226, 231)
BAR, NEGATIVE = (3, 112, 135), (196, 92, 48)
LEFT, TOP = 92, 68  # where plots begin
TITLE, LABEL, TICK, SMALL = 23, 16, 14, 13  # type sizes
CAPTION = 66  # height of what stands under a plot: tick labels and the axis's name
NOTE, LINE = 34, 19  # heights of the foot with one note, and of each further note
INSET = 28  # between the frame of a line chart and its first and last point
STRIP = 22  # height of a heat map's row of spans
ROW, ACROSS = 34, 4  # of a dot chart: height of a row, most panels side by side
WIDEST_CELL = 56  # of a heat map's columns
ZOOMED = 60  # most tokens of the heat map that is written out
TEXT_HEIGHT = 112  # of token texts
FALLBACK_FONTS = ("NotoSansCJK-Regular.ttc", "msyh.ttc", "PingFang.ttc", "DejaVuSans.ttf", "arial.ttf")

# Equal steps of OKLab lightness, 0.975 to 0.22, while the hue turns from cream over green and teal to indigo.
COLOR_MAP = (
    (251, 248, 225),
    (206, 224, 175),
    (141, 203, 148),
    (44, 180, 146),
    (2, 146, 146),
    (3, 112, 135),
    (0, 79, 122),
    (27, 45, 96),
    (27, 19, 56),
)


class Series(NamedTuple):
    """A line of a line chart; NaN leaves a point out. `spread`: the (low, high) of each point, drawn as a bar."""

    name: str
    values: Sequence[float]
    color: Color
    marker: Marker = "circle"
    spread: Sequence[tuple[float, float] | None] | None = None


class Dots(NamedTuple):
    """A row of a dot chart: a mean with its interval, and the values behind it."""

    name: str
    mean: float
    interval: tuple[float, float] | None
    values: Sequence[float]


class Panel(NamedTuple):
    """A plot of a dot chart, with an axis of its own."""

    label: str
    rows: Sequence[Dots]


class Band(NamedTuple):
    """The tokens `start:stop` of a heat map; of its `labels` the first that fits is written."""

    start: int
    stop: int
    kind: str
    labels: Sequence[str]
    color: Color


def bar_chart(
    values: Sequence[float],
    names: Sequence[str],
    *,
    title: str,
    x_label: str,
    y_label: str,
    reference: tuple[float, str] | None = None,
    note: str = "",
) -> Image.Image:
    """Draws one bar per value, those below zero in another colour; `reference`: a dashed line and its name."""
    canvas = _sheet(HEIGHT - NOTE, title, note)
    margin = 28 + length(reference[1]) if reference else 40
    box = (LEFT, TOP, WIDTH - margin, HEIGHT - NOTE - CAPTION)
    shown = [0.0, *values, *([reference[0]] if reference else [])]
    pad = 0.06 * (max(shown) - min(shown))  # for the numbers at the bars' ends
    y = _vertical(canvas, box, min(shown) and min(shown) - pad, max(shown) and max(shown) + pad, y_label)
    step = (box[2] - box[0]) / len(values)
    half = min(0.36 * step, 55)
    x = [box[0] + step * (i + 0.5) for i in range(len(values))]
    for middle, value in zip(x, values, strict=True):
        low, high = sorted((y(value), y(0)))
        canvas.box((middle - half, low, middle + half, high), NEGATIVE if value < 0 else BAR)
        if length(f"{value:.2f}") <= step - 4:
            at, anchor = (low - 5, "ms") if value >= 0 else (high + 5, "mt")
            canvas.text(middle, at, f"{value:.2f}", anchor=anchor)
    canvas.line([(box[0], y(0)), (box[2], y(0))], INK, 1.5)
    if reference:
        height = y(reference[0])
        canvas.line([(box[0], height), (box[2], height)], INK, 1.5, dash=6)
        canvas.text(box[2] + 8, height, reference[1], anchor="lm")
    _horizontal(canvas, box, x, names, x_label)
    return canvas.finish()


def line_chart(
    series: Sequence[Series],
    names: Sequence[str],
    *,
    title: str,
    x_label: str,
    y_label: str,
    low: float | None = None,
    note: str = "",
) -> Image.Image:
    """Draws lines over shared positions `names`, each labelled at its right end; `low`: where the axis must begin."""
    canvas = _sheet(HEIGHT - NOTE, title, note)
    margin = 70 + max(length(entry.name, LABEL) for entry in series)
    box = (LEFT, TOP, WIDTH - margin, HEIGHT - NOTE - CAPTION)
    values = [value for entry in series for value in (*entry.values, *_ends(entry)) if not math.isnan(value)]
    bottom = min(values) if low is None else low
    y = _vertical(canvas, box, bottom, max(values), y_label)
    step = (box[2] - box[0] - 2 * INSET) / max(len(names) - 1, 1)
    x = [box[0] + INSET + step * i for i in range(len(names))]
    for entry in series:
        for middle, spread in zip(x, entry.spread or (), strict=False):
            if spread:
                canvas.line([(middle, y(max(spread[0], bottom))), (middle, y(spread[1]))], entry.color, 1.5)
        points = [(x[i], y(value)) for i, value in enumerate(entry.values) if not math.isnan(value)]
        if len(points) > 1:
            canvas.line(points, entry.color, 2.5)
        for point in points:
            canvas.marker(*point, entry.marker, entry.color, 5 if step > 24 else 3.5)
    ends = [y(entry.values[-1]) for entry in series]
    for entry, end, height in zip(series, ends, _apart(ends, 21, box[1] + 8, box[3]), strict=True):
        canvas.line([(x[-1] + 9, end), (box[2] + 8, height)], entry.color, 1)
        canvas.marker(box[2] + 17, height, entry.marker, entry.color, 4)
        canvas.text(box[2] + 30, height, entry.name, LABEL, anchor="lm")
    _horizontal(canvas, box, x, names, x_label)
    return canvas.finish()


def dot_chart(panels: Sequence[Panel], *, title: str, note: str = "") -> Image.Image:
    """Draws means with their intervals as bars and single values as small dots, up to `ACROSS` panels side by side.

    Rows are joined by name; a panel without a row leaves its place empty.
    """
    names = list(dict.fromkeys(row.name for panel in panels for row in panel.rows))
    left = 24 + max(map(length, names)) + 18
    bands = [panels[at : at + ACROSS] for at in range(0, len(panels), ACROSS)]
    tall = ROW * len(names) + 12
    canvas = _sheet(TOP + len(bands) * (tall + CAPTION + 10) - 10, title, note)
    wide = (WIDTH + 8 - left) / min(len(panels), ACROSS)
    for number, band in enumerate(bands):
        top = TOP + number * (tall + CAPTION + 10)
        height = {name: top + 10 + ROW * (i + 0.5) for i, name in enumerate(names)}
        for name in {row.name for panel in band for row in panel.rows}:
            canvas.text(left - 18, height[name], name, anchor="rm")
        for place, panel in enumerate(band):
            box = (left + place * wide, top, left + (place + 1) * wide - 40, top + tall)
            _dots(canvas, box, panel, height)
    return canvas.finish()


def heat_map(
    values: np.ndarray,
    names: Sequence[str],
    bands: Sequence[Band] = (),
    *,
    title: str,
    x_label: str,
    y_label: str,
    value_label: str,
    texts: Sequence[str] | None = None,
    zoom: tuple[int, int] | None = None,
    note: str = "",
) -> Image.Image:
    """Draws values [T, L] >= 0 as T columns of L cells, the first layer at the bottom, under a strip of spans.

    The scale ends at the highest cell, or short of a few outliers. Tokens beyond one per px are averaged over
    neighbours. Notes at the foot say so.

    Args:
        names: of the L layers.
        texts: of the T tokens, written below where T <= `ZOOMED`.
        zoom: tokens `start:stop` to draw again with their texts where T is larger, `ZOOMED` of them at most.
    """
    room = WIDTH - 128 - LEFT
    tall = min(max(20 * len(names), 170), 330)
    whole = texts is not None and len(values) <= ZOOMED
    start, stop = (0, 0) if zoom is None or whole else (zoom[0], min(zoom[1], zoom[0] + ZOOMED))
    pooled = math.ceil(len(values) / room)
    columns = np.add.reduceat(values, range(0, len(values), pooled), axis=0)
    columns = columns / np.minimum(pooled, len(values) - np.arange(len(columns)) * pooled)[:, None]
    parts = [columns, values[start:stop]] if stop else [columns]
    high, highest = max(map(_top, parts)), max(part.max() for part in parts)
    notes = [note] if note else []
    if pooled > 1:
        notes.append(f"Each column of the upper map is the mean of {pooled} tokens.")
    if stop and stop < zoom[1]:
        notes.append(f"Written out: the first {stop - start} of {zoom[1] - start} tokens.")
    if highest > high:
        notes.append(f"A few cells lie above the scale, the highest at {highest:.3g}.")

    top = TOP + 26 + STRIP
    lower = top + tall + (TEXT_HEIGHT if whole else CAPTION + 8 + STRIP)  # where the map ends, or the second begins
    canvas = _sheet(lower + tall + TEXT_HEIGHT if stop else lower, title, *notes)
    _legend(canvas, TOP + 4, bands)
    width = min(room / len(values), WIDEST_CELL)
    box = (LEFT, top, LEFT + width * len(values), top + tall)
    _cells(canvas, box, columns / high, names, y_label)
    _strip(canvas, box, bands, 0, len(values))
    _scale(canvas, (box[2] + 26, top, box[2] + 44, top + tall), high, value_label)
    if whole:
        _texts(canvas, box, texts)
    else:
        marks = [t for t in _ticks(0, len(values) - 1, 8) if t == int(t)]
        _horizontal(canvas, box, [box[0] + (t + 0.5) * width for t in marks], [f"{t:.0f}" for t in marks], x_label)
    if stop:
        width = min(room / (stop - start), WIDEST_CELL)
        box = (LEFT, lower, LEFT + width * (stop - start), lower + tall)
        _cells(canvas, box, values[start:stop] / high, names, y_label)
        _strip(canvas, box, bands, start, stop)
        _texts(canvas, box, (texts or [])[start:stop])
    return canvas.finish()


def colors(shares: np.ndarray) -> np.ndarray:
    """Values [...] of 0..1 → uint8 [..., 3] of the colour map; what lies outside takes the end's colour."""
    at = np.clip(shares, 0, 1) * (len(COLOR_MAP) - 1)
    channels = [np.interp(at, range(len(COLOR_MAP)), channel) for channel in zip(*COLOR_MAP, strict=True)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


# Parts of charts.


def _sheet(height: float, title: str, *notes: str) -> Canvas:
    """Paper that high, with a title, and below it a line for each note."""
    canvas = Canvas(height + NOTE + LINE * max(len(notes) - 1, 0))
    canvas.text(WIDTH / 2, 38, title, TITLE, anchor="ms")
    for i, note in enumerate(notes):
        canvas.text(WIDTH - 20, height + NOTE - 13 + LINE * i, note, SMALL, FADED, anchor="rs")
    return canvas


def _vertical(canvas: Canvas, box: Box, low: float, high: float, label: str):
    """Draws the y axis and its grid over a range widened to round numbers; returns value → height on the sheet."""
    ticks = _ticks(low, high, 7, outer=True)
    low, high = ticks[0], ticks[-1]

    def y(value: float) -> float:
        return box[3] - (value - low) / (high - low) * (box[3] - box[1])

    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    if any(abs(round(tick, digits) - tick) > 1e-9 * (high - low) for tick in ticks):
        digits += 1  # steps of 2.5
    for tick in ticks:
        canvas.line([(box[0], y(tick)), (box[2], y(tick))], GRID)
        canvas.text(box[0] - 10, y(tick), f"{tick:.{digits}f}", color=FADED, anchor="rm")
    canvas.upright(26, (box[1] + box[3]) / 2, label, LABEL)
    return y


def _dots(canvas: Canvas, box: Box, panel: Panel, height: Mapping[str, float]) -> None:
    """Draws one panel, whose axis is widened to round numbers around all that it shows."""
    shown = [v for row in panel.rows for v in (row.mean, *row.values, *(row.interval or ()))]
    ticks = _ticks(min(shown), max(shown), 3, outer=True)
    low, high = ticks[0], ticks[-1]

    def x(value: float) -> float:
        return box[0] + 8 + (value - low) / (high - low) * (box[2] - box[0] - 16)

    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    if any(abs(round(tick, digits) - tick) > 1e-9 * (high - low) for tick in ticks):
        digits += 1
    for tick in ticks:
        canvas.line([(x(tick), box[1]), (x(tick), box[3])], GRID)
    _horizontal(canvas, box, [x(tick) for tick in ticks], [f"{tick:.{digits}f}" for tick in ticks], panel.label)
    for row in panel.rows:
        y = height[row.name]
        if row.interval:
            canvas.line([(x(row.interval[0]), y), (x(row.interval[1]), y)], BAR, 2)
        for value in row.values:
            canvas.marker(x(value), y, "circle", FADED, 2.5)
        canvas.marker(x(row.mean), y, "diamond", BAR, 5)
        canvas.text(x(row.mean), y - 8, f"{row.mean:.{max(2, digits)}f}", SMALL, anchor="ms")


def _ends(entry: Series) -> list[float]:
    return [end for spread in entry.spread or () if spread for end in spread]


def _horizontal(canvas: Canvas, box: Box, at: Sequence[float], names: Sequence[str], label: str) -> None:
    """Draws ticks under a plot; leaves names out evenly where they would touch."""
    room = (at[-1] - at[0]) / (len(at) - 1) if len(at) > 1 else math.inf
    every = math.ceil((max(map(length, names)) + 8) / room) if room < math.inf else 1
    for x, name in list(zip(at, names, strict=True))[::every]:
        canvas.line([(x, box[3]), (x, box[3] + 5)], FADED)
        canvas.text(x, box[3] + 9, name, color=FADED, anchor="mt")
    canvas.text(max((box[0] + box[2]) / 2, box[0] + length(label, LABEL) / 2), box[3] + 50, label, LABEL, anchor="ms")


def _cells(canvas: Canvas, box: Box, shares: np.ndarray, names: Sequence[str], label: str) -> None:
    canvas.paste(colors(shares.T[::-1]), box)
    row = (box[3] - box[1]) / len(names)
    every = math.ceil((TICK + 3) / row)
    for i, name in list(enumerate(names))[::every]:
        canvas.text(box[0] - 10, box[3] - (i + 0.5) * row, name, color=FADED, anchor="rm")
    canvas.upright(26, (box[1] + box[3]) / 2, label, LABEL)


def _strip(canvas: Canvas, box: Box, bands: Sequence[Band], start: int, stop: int) -> None:
    """Names the spans over a heat map of the tokens `start:stop`, and marks where they begin and end."""
    width = (box[2] - box[0]) / (stop - start)
    last = box[0]
    for band in bands:
        if band.stop <= start or band.start >= stop:
            continue
        left = box[0] + (max(band.start, start) - start) * width
        right = box[0] + (min(band.stop, stop) - start) * width
        canvas.box((left + 0.5, box[1] - STRIP, max(right - 0.5, left + 1), box[1] - 4), band.color)
        for edge in (left, right):
            if last + 5 < edge < box[2] - 1:
                canvas.line([(edge, box[1] - 4), (edge, box[3])], PAPER, 1.5)
                last = edge
        if label := next((label for label in band.labels if length(label, SMALL) <= right - left - 6), ""):
            ink = PAPER if np.dot(band.color, (0.3, 0.6, 0.1)) < 150 else INK
            canvas.text((left + right) / 2, box[1] - 4 - (STRIP - 4) / 2, label, SMALL, ink, "mm")


def _texts(canvas: Canvas, box: Box, texts: Sequence[str]) -> None:
    width = (box[2] - box[0]) / max(len(texts), 1)
    for i, text in enumerate(texts):
        canvas.upright(box[0] + (i + 0.5) * width, box[3] + 6, text, TICK if width >= 15 else 12, end="t")


def _legend(canvas: Canvas, y: float, bands: Sequence[Band]) -> None:
    x = float(LEFT)
    for kind, color in {band.kind: band.color for band in bands}.items():
        canvas.box((x, y - 6, x + 12, y + 6), color)
        canvas.text(x + 18, y, kind, TICK, anchor="lm")
        x += 18 + length(kind) + 24


def _scale(canvas: Canvas, box: Box, high: float, label: str) -> None:
    canvas.paste(colors(np.linspace(1, 0, 256)[:, None]), box)
    ticks = _ticks(0, high, 5)
    digits = max(0, -math.floor(math.log10(ticks[1]) + 1e-9)) + (f"{ticks[1]:e}"[2] != "0")
    for tick in ticks:
        if tick <= high * (1 + 1e-9):
            y = box[3] - tick / high * (box[3] - box[1])
            canvas.line([(box[2], y), (box[2] + 5, y)], FADED)
            canvas.text(box[2] + 9, y, f"{tick:.{digits}f}", color=FADED, anchor="lm")
    canvas.upright(box[2] + 62, (box[1] + box[3]) / 2, label, LABEL)


def _top(cells: np.ndarray) -> float:
    """Where a scale ends: at the highest cell, unless that is over 1.5 times the 99.5 % quantile."""
    high, most = float(cells.max()), float(np.quantile(cells, 0.995))
    return most if 0 < 1.5 * most < high else high or 1.0


def _ticks(low: float, high: float, most: int, outer: bool = False) -> list[float]:
    """Round numbers from low to high, at most about `most`; with `outer`, out to those around low and high."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10, 20) if factor * power >= raw * (1 - 1e-9))
    first, last = low / step, high / step
    first = math.floor(first + 1e-9) if outer else math.ceil(first - 1e-9)
    last = math.ceil(last - 1e-9) if outer else math.floor(last + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _apart(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Moves heights apart to at least `gap`, within low..high as far as they fit, in their order."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    moved = [0.0] * len(heights)
    at = low - gap
    for i in order:
        at = moved[i] = max(heights[i], at + gap)
    at = high + gap
    for i in reversed(order):
        at = moved[i] = min(moved[i], at - gap)
    return moved


# Paper and pen.


class Canvas:
    """White paper under a pen that counts in px of the finished picture."""

    def __init__(self, height: float, width: float = WIDTH):
        self.image = Image.new("RGB", (round(width) * SCALE, round(height) * SCALE), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def box(self, box: Box, fill: Color) -> None:
        left, top, right, bottom = (round(value * SCALE) for value in box)
        if right > left and bottom > top:
            self.draw.rectangle((left, top, right - 1, bottom - 1), fill)

    def line(self, points: Sequence[tuple[float, float]], color: Color, width: float = 1, dash: float = 0) -> None:
        """Draws a polyline; with `dash`, a horizontal line of strokes that long."""
        if dash:
            (left, y), (right, _) = points
            for start in np.arange(left, right, 2 * dash):
                self.line([(start, y), (min(start + dash, right), y)], color, width)
            return
        for start, stop in pairwise(np.array(points, dtype=float) * SCALE):  # Pillow's own wide lines vary in width
            along = (stop - start) / max(np.hypot(*(stop - start)), 1e-9) * width * SCALE / 2
            across = np.array([-along[1], along[0]])
            corners = (start - along + across, stop + along + across, stop + along - across, start - along - across)
            self.draw.polygon([tuple(corner) for corner in corners], color)

    def marker(self, x: float, y: float, shape: Marker, color: Color, radius: float = 5) -> None:
        """Draws a filled shape with a white rim."""
        for r, fill in ((radius + 1.5, PAPER), (radius, color)):
            if shape == "circle":
                self.draw.ellipse([value * SCALE for value in (x - r, y - r, x + r, y + r)], fill)
                continue
            corners = {
                "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
                "diamond": [(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)],
                "up": [(0, -1.2), (1.15, 0.9), (-1.15, 0.9)],
                "down": [(0, 1.2), (1.15, -0.9), (-1.15, -0.9)],
            }[shape]
            self.draw.polygon([((x + dx * r) * SCALE, (y + dy * r) * SCALE) for dx, dy in corners], fill)

    def text(self, x: float, y: float, text: str, size: int = TICK, color: Color = INK, anchor: str = "ls") -> None:
        self.draw.text((x * SCALE, y * SCALE), text, color, _font(size * SCALE, text.isascii()), anchor)

    def upright(self, x: float, y: float, text: str, size: int = TICK, end: Literal["m", "t"] = "m") -> None:
        """Writes upwards, centred on x, with the middle or the top end of the text at y."""
        if not text:
            return
        font = _font(size * SCALE, text.isascii())
        mask = Image.new("L", (math.ceil(font.getlength(text)), round(size * SCALE * 1.4)))
        ImageDraw.Draw(mask).text((0, mask.height / 2), text, 255, font, "lm")
        mask = mask.transpose(Image.Transpose.ROTATE_90)
        top = y * SCALE - (mask.height / 2 if end == "m" else 0)
        self.image.paste(INK, (round(x * SCALE - mask.width / 2), round(top)), mask)

    def paste(self, pixels: np.ndarray, box: Box) -> None:
        """Fills a box with an array [rows, columns, 3] of uint8, each entry one flat cell."""
        left, top, right, bottom = (round(value * SCALE) for value in box)
        rows = np.arange(bottom - top) * len(pixels) // (bottom - top)
        columns = np.arange(right - left) * pixels.shape[1] // (right - left)
        self.image.paste(Image.fromarray(pixels[rows][:, columns]), (left, top))

    def finish(self) -> Image.Image:
        return self.image.reduce(SCALE)


def length(text: str, size: int = TICK) -> float:
    """How wide a text is, in px of the finished picture."""
    return _font(size * SCALE, text.isascii()).getlength(text) / SCALE


@cache
def _font(size: int, ascii: bool = True) -> ImageFont.FreeTypeFont:
    """Pillow's own font, which covers ASCII; for other text the first font of this machine that covers more."""
    for name in () if ascii else FALLBACK_FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)
