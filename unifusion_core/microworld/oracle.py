"""Pictures → scenes, by analysis by synthesis: the judge of what a model drew.

Each cell is measured (colour, coverage, centroid), matched against a bank of coverages, fitted to the pixels by
Gauss-Newton, and given the stripes and the mark whose synthesis by `render` is nearest.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from PIL import Image

from .render import MARK_COLOR, distance, paint, thing_layers
from .scene import BACKGROUNDS, CELL, COLORS, MARKS, MOST_CELLS, SHAPES, SIZES, STRIPES, Detail, Scene, Thing

BORDER = 2  # px along a cell's edges where hardly anything but background stands
FOREGROUND = (24.0, 48.0)  # colour distance from the background: noise of 6 stays below, the faintest colour above
MIN_AREA_SHARE = 0.35  # of the smallest shape's area: less foreground than this is no thing
INNER_PIXELS = 12  # as many pixels away from all edges tell the colour better than all pixels do
COLOR_TOLERANCE = 60.0  # colour distance that a single odd pixel (a mark, an edge) may weigh at most
LIGHT_RANGE = (0.3, 1.1)  # factors on a palette colour: the darkest stripe of the darkest shade, and some more
STRIPE_FLOOR = 0.5  # a stripe's dark over its bright, rounded down
BANK_ROTATIONS = tuple(float(degrees) for degrees in range(-25, 26, 10))  # the table's range; fitting does the rest
BANK_RADII = (6.5, 7.5, 8.5, 9.5, 10.25, 11.25, 12.25, 13.25)  # px: the two sizes, between and around them
INNER_DEPTH = 1.0  # px under the edge, where even a slightly blurred picture shows the thing alone
CONTRAST = 0.5  # of stripes and marks in candidates: a quarter of the full contrast then tells them from none
LOOK_STEP = 0.25  # px: stripes and marks look alike over less, so their pictures are kept by offset
FINALISTS = 2  # shapes that are fitted: the bank's ranking is right but for near ties
FIT_STEPS = 3  # of Gauss-Newton: from the bank's grid there is next to nothing left to gain by a fourth
FIT_LIMITS = ((-8.0, 8.0), (-8.0, 8.0), (-30.0, 30.0), (5.5, 15.0))  # dx, dy in px, rotation in degrees, radius in px
FIT_DAMPING = (1.0, 1.0, 0.02, 1.0)  # keeps a free parameter (a circle's rotation) where it is
EDGE = 0.75  # px on both sides, a little more than antialiasing covers
ERROR_LIMIT = 0.12  # mean colour error at which a reading is worth nothing: noise of 6/255 is at 0.02

SHADE_TOLERANCE = 0.08  # less than a third of the range, about what an eye sees side by side
ROTATION_TOLERANCE = 10.0  # degrees, a fifth of the range
OFFSET_TOLERANCE = 0.75  # px, a quarter of the range, along both axes
SYMMETRY = {"circle": 0.0, "square": 90.0, "triangle": 120.0, "star": 72.0, "cross": 90.0, "heart": 360.0}  # degrees

_AXIS = np.arange(CELL, dtype=np.float32) + 0.5 - CELL / 2
_Y, _X = np.meshgrid(_AXIS, _AXIS, indexing="ij")
_AT_BORDER = np.maximum(np.abs(_X), np.abs(_Y)) > CELL / 2 - BORDER
_PALETTE = np.asarray(tuple(COLORS.values()), np.float32)
_GROUNDS = np.asarray(tuple(BACKGROUNDS.values()), np.float32)


@dataclass(frozen=True, kw_only=True)
class ReadThing:
    """A thing with its detail as measured.

    `confidence` 0..1 is the margin of the best shape's misfit to the runner-up's, lowered as `error`, the mean absolute
    colour error (0..1) over the cell against its own re-rendering, nears `ERROR_LIMIT`.
    """

    thing: Thing
    confidence: float
    error: float


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What `read` saw; `error` is the mean absolute colour error (0..1) of the picture against its re-rendering."""

    background: str
    things: tuple[ReadThing, ...]
    rows: int
    columns: int
    error: float

    @property
    def scene(self) -> Scene:
        return Scene(
            background=self.background,
            things=tuple(read.thing for read in self.things),
            rows=self.rows,
            columns=self.columns,
        )

    @property
    def confidence(self) -> float:
        """That of the least certain thing, and no more than the picture's error allows."""
        return min([_trust(self.error), *(read.confidence for read in self.things)])


@dataclass(frozen=True)
class _Shape:
    """A shape in place: offset in px from the cell's centre, rotation in degrees, radius in px of any size."""

    name: str
    dx: float
    dy: float
    rotation: float
    radius: float

    @property
    def size(self) -> str:
        return min(SIZES, key=lambda size: abs(SIZES[size] - self.radius))

    @property
    def values(self) -> np.ndarray:
        return np.asarray((self.dx, self.dy, self.rotation, self.radius), np.float64)


def read(image: Image.Image | np.ndarray) -> Reading:
    """The scene that a picture shows.

    Args:
        image: a PIL image, or an array [H, W, 3], uint8 or float in 0..1, of up to 4 by 4 cells of 32 px.

    Raises:
        ValueError: the array is neither, or its size is not one of a canvas.
    """
    pixels = _pixels(image)
    rows, columns = pixels.shape[0] // CELL, pixels.shape[1] // CELL
    cells = pixels.reshape(rows, CELL, columns, CELL, 3).swapaxes(1, 2)
    ground = np.median(cells[:, :, _AT_BORDER].reshape(-1, 3), axis=0)
    background = tuple(BACKGROUNDS)[int(np.square(_GROUNDS - ground).sum(-1).argmin())]
    low, high = FOREGROUND
    masks = np.clip((np.sqrt(np.square(cells - ground).sum(-1)) - low) / (high - low), 0.0, 1.0)
    cells_of = [cell for cell in np.ndindex(rows, columns) if masks[cell].sum() >= _min_area()]
    found = [_read_cell(cells[cell], masks[cell], ground, background, cell) for cell in cells_of]
    canvas = np.empty_like(pixels)
    canvas[:] = BACKGROUNDS[background]
    paint(canvas, [thing for thing, _ in found])
    errors = np.abs(canvas - pixels).reshape(rows, CELL, columns, CELL, 3).mean((1, 3, 4)) / 255.0
    things = tuple(
        ReadThing(thing=thing, confidence=margin * _trust(errors[thing.cell]), error=float(errors[thing.cell]))
        for thing, margin in found
    )
    return Reading(background=background, things=things, rows=rows, columns=columns, error=float(errors.mean()))


def exact(reading: Reading | Scene, scene: Scene) -> bool:
    """Whether canvas, background, and every thing's shape, colour, size and cell are right; detail is free."""
    return _named(reading) == _named(scene)


def attribute_scores(reading: Reading | Scene, scene: Scene) -> dict[str, float]:
    """How far a reading meets the wanted scene, 0..1 each.

    `shape`, `color` and `size` are shares of the wanted things whose cell is occupied (0 if none is), `position` is the
    share of cells, wanted or occupied, that are both; `count` and `background` are 0 or 1.
    """
    got = {thing.cell: thing for thing in _scene(reading).things}
    wanted = {thing.cell: thing for thing in scene.things}
    pairs = [(got[cell], thing) for cell, thing in wanted.items() if cell in got]
    either = len(got.keys() | wanted.keys())
    scores = {
        name: sum(getattr(one, name) == getattr(other, name) for one, other in pairs) / len(pairs)
        if pairs
        else float(not wanted)
        for name in ("shape", "color", "size")
    }
    return {
        **scores,
        "position": len(pairs) / either if either else 1.0,
        "count": float(len(got) == len(wanted)),
        "background": float(reading.background == scene.background),
    }


def detail_scores(read: Thing, true: Thing) -> dict[str, bool]:
    """Which of a true thing's details are met; rotation is compared modulo the true shape's symmetry."""
    one, other, period = read.detail, true.detail, SYMMETRY[true.shape]
    turn = abs((one.rotation - other.rotation + period / 2) % period - period / 2) if period else 0.0
    return {
        "shade": abs(one.shade - other.shade) <= SHADE_TOLERANCE,
        "rotation": turn <= ROTATION_TOLERANCE,
        "offset": max(abs(one.dx - other.dx), abs(one.dy - other.dy)) <= OFFSET_TOLERANCE,
        "stripes": one.stripes == other.stripes,
        "mark": one.mark == other.mark,
    }


def _scene(reading: Reading | Scene) -> Scene:
    return reading.scene if isinstance(reading, Reading) else reading


def _named(reading: Reading | Scene) -> tuple:
    scene = _scene(reading)
    return scene.size, scene.background, tuple(thing.attributes for thing in scene.things)


def _trust(error: float) -> float:
    return float(np.clip(1.0 - error / ERROR_LIMIT, 0.0, 1.0))


def _pixels(image: Image.Image | np.ndarray) -> np.ndarray:
    """[H, W, 3] float32 in 0..255."""
    array = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"expected a picture [H, W, 3], got an array of shape {array.shape}")
    height, width = array.shape[:2]
    if any(side % CELL or not 0 < side <= MOST_CELLS * CELL for side in (height, width)):
        raise ValueError(
            f"expected height and width to be multiples of {CELL} px up to {MOST_CELLS * CELL}, got {height} by {width}"
        )
    if array.dtype == np.uint8:
        return array.astype(np.float32)
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"expected uint8, or float in 0..1, got {array.dtype}")
    return np.clip(np.nan_to_num(array.astype(np.float32)), 0.0, 1.0) * 255.0


def _read_cell(
    patch: np.ndarray, mask: np.ndarray, ground: np.ndarray, background: str, cell: tuple[int, int]
) -> tuple[Thing, float]:
    """A cell's thing, and the margin 0..1 of its shape's misfit to that of the runner-up."""
    color, alpha = _measure(patch, mask, ground)
    finalists = _match(alpha)
    look, _ = _dress(finalists[0], color, patch)
    ground = np.asarray(BACKGROUNDS[background], np.float32)
    fits = sorted((_fit(shape, patch, ground, look) for shape in finalists), key=lambda fit: fit[0])
    (misfit, shape), (second, _) = fits[:2]
    _, detail = _dress(shape, color, patch)
    thing = Thing(shape=shape.name, color=color, size=shape.size, row=cell[0], column=cell[1], detail=detail)
    return thing, 1.0 - misfit / second if second > 0.0 else 0.0


def _measure(patch: np.ndarray, mask: np.ndarray, ground: np.ndarray) -> tuple[str, np.ndarray]:
    """The palette colour of the foreground, and how far each pixel is covered by it."""
    solid = mask >= 0.5
    inner = solid.copy()
    for axis in (0, 1):
        inner &= np.roll(solid, 1, axis) & np.roll(solid, -1, axis)
    to_ground = np.sqrt(np.square(patch - ground).sum(-1))
    chosen = inner if inner.sum() >= INNER_PIXELS else mask > 0.0
    pixels, weight = patch[chosen], np.square(to_ground[chosen])
    square = np.square(_PALETTE).sum(-1)
    light = np.clip(pixels @ _PALETTE.T / square, *LIGHT_RANGE)
    away = np.sqrt(np.square(pixels[:, None] - light[..., None] * _PALETTE).sum(-1))
    best = int((weight @ np.minimum(away, COLOR_TOLERANCE)).argmin())

    color, bright = _PALETTE[best], float(np.percentile(light[:, best], 90))
    light = np.clip(patch @ color / square[best], STRIPE_FLOOR * bright, bright)
    to_color = np.sqrt(np.square(patch - light[..., None] * color).sum(-1))
    return tuple(COLORS)[best], mask * to_ground / (to_ground + to_color + 1e-6)


def _match(alpha: np.ndarray) -> list[_Shape]:
    """The shapes whose coverage at its best rotation and radius is most like the measured one, best first."""
    weight = alpha.sum()
    offsets = [float(np.clip((alpha * axis).sum() / weight, *FIT_LIMITS[0])) for axis in (_X, _Y)]
    whole = [int(np.floor(round(2 * offset) / 2)) for offset in offsets]
    half = tuple(round(2 * offset) % 2 for offset in offsets)
    moved = _shifted(alpha, -whole[1], -whole[0]).reshape(-1)
    candidates, halves = _bank()
    covers, areas = halves[half]
    common = np.minimum(covers, moved).sum(-1)
    overlap = common / (areas + moved.sum() - common)
    shapes: dict[str, _Shape] = {}
    for index in np.argsort(-overlap):
        name, rotation, radius = candidates[index]
        shapes.setdefault(name, _Shape(name, *offsets, rotation, radius))
        if len(shapes) == FINALISTS:
            break
    return list(shapes.values())


def _shifted(array: np.ndarray, down: int, right: int) -> np.ndarray:
    moved = np.roll(array, (down, right), (0, 1))
    if down:
        moved[slice(None, down) if down > 0 else slice(down, None)] = 0.0
    if right:
        moved[:, slice(None, right) if right > 0 else slice(right, None)] = 0.0
    return moved


def _fit(shape: _Shape, patch: np.ndarray, ground: np.ndarray, look: np.ndarray) -> tuple[float, _Shape]:
    """The mean squared error and the place of a shape of a given look, after least squares over its four values."""
    contrast = look - ground
    weight = np.square(contrast).sum(-1)
    target = ((patch - ground) * contrast).sum(-1) / np.maximum(weight, 1e-6)
    weight = weight / max(float(weight.mean()), 1e-6)
    values = shape.values
    for _ in range(FIT_STEPS):
        away = _away(shape.name, *values)
        edge = np.abs(away) < EDGE
        # An offset, a turn and a growth move the edge as the distance's slopes along x and y say.
        slope_y, slope_x = (slope[edge] for slope in np.gradient(away))
        x, y, radius = _X[edge] - values[0], _Y[edge] - values[1], values[3]
        turn = np.deg2rad(slope_y * x - slope_x * y)
        jacobian = np.stack((slope_x, slope_y, turn, (x * slope_x + y * slope_y - away[edge]) / radius))
        weighted = jacobian * weight[edge]
        missing = target[edge] - np.clip(0.5 - away[edge], 0.0, 1.0)
        step = np.linalg.solve(weighted @ jacobian.T + np.diag(FIT_DAMPING), weighted @ missing)
        values = np.clip(values + step, *np.transpose(FIT_LIMITS))
    cover = _cover(shape.name, *values)
    misfit = float(np.square(patch - ground - cover[..., None] * contrast).mean())
    return misfit, _Shape(shape.name, *map(float, values))


def _dress(shape: _Shape, color: str, patch: np.ndarray) -> tuple[np.ndarray, Detail]:
    """The colours [32, 32, 3] of a shape in place and its detail, by least squares over stripes, marks and shade."""
    lights, dots = _looks(shape.size, *(round(offset / LOOK_STEP) * LOOK_STEP for offset in (shape.dx, shape.dy)))
    palette = np.asarray(COLORS[color], np.float32)

    inner = _away(shape.name, *shape.values) <= -INNER_DEPTH
    pixels = patch[inner]

    def fit(lights: np.ndarray, dots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rest = (pixels - MARK_COLOR * dots[..., None]).reshape(1, len(dots), -1)
        unit = ((lights[:, None] * (1.0 - dots))[..., None] * palette).reshape(len(lights), len(dots), -1)
        along, square = (unit * rest).sum(-1), np.square(unit).sum(-1)
        shade = np.clip(along / np.maximum(square, 1e-6), *LIGHT_RANGE)
        return np.square(rest).sum(-1) - 2 * shade * along + np.square(shade) * square, shade

    mean = lights.mean((1, 2))[:, None]
    misfit, _ = fit(mean + CONTRAST * (lights[:, inner] - mean), CONTRAST * dots[:, inner])
    stripe, mark = np.unravel_index(int(misfit.argmin()), misfit.shape)
    shade = float(fit(lights[stripe, inner][None], dots[mark, inner][None])[1].item())
    look = (shade * lights[stripe])[..., None] * palette
    look += dots[mark, ..., None] * (MARK_COLOR - look)
    return look, Detail(
        shade=shade,
        rotation=shape.rotation,
        dx=shape.dx,
        dy=shape.dy,
        stripes=STRIPES[stripe],
        mark=MARKS[mark],
    )


@lru_cache(maxsize=1024)
def _looks(size: str, dx: float, dy: float) -> tuple[np.ndarray, np.ndarray]:
    """The light [3, 32, 32] of each stripes at full shade, and the coverage [5, 32, 32] of each mark."""

    def red(shade: float, stripes: str, mark: str) -> np.ndarray:
        detail = Detail(shade=shade, dx=dx, dy=dy, stripes=stripes, mark=mark)
        return thing_layers(Thing(shape="circle", color="red", size=size, row=0, column=0, detail=detail))[1][..., 0]

    lights = np.stack([red(1.0, stripes, "none") for stripes in STRIPES]) / np.float32(COLORS["red"][0])
    return lights, np.stack([red(0.0, "none", mark) for mark in MARKS]) / np.float32(MARK_COLOR)


def _away(name: str, dx: float, dy: float, rotation: float, radius: float) -> np.ndarray:
    return distance(name, _X - np.float32(dx), _Y - np.float32(dy), radius, rotation)


def _cover(name: str, dx: float, dy: float, rotation: float, radius: float) -> np.ndarray:
    return np.clip(0.5 - _away(name, dx, dy, rotation, radius), 0.0, 1.0)


@cache
def _bank() -> tuple[list[tuple[str, float, float]], dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]]:
    """Names, rotations and radii; their coverages [M, 1024] and areas [M], by whether x and y are off by half a px."""
    candidates = [
        (name, rotation, radius)
        for name in SHAPES
        for rotation in (BANK_ROTATIONS if SYMMETRY[name] else (0.0,))
        for radius in BANK_RADII
    ]
    covers = {
        (right, down): np.stack([_cover(name, right / 2, down / 2, *rest).reshape(-1) for name, *rest in candidates])
        for right in (0, 1)
        for down in (0, 1)
    }
    return candidates, {half: (cover, cover.sum(-1)) for half, cover in covers.items()}


@cache
def _min_area() -> float:
    """In px."""
    return MIN_AREA_SHARE * min(float(_cover(name, 0.0, 0.0, 0.0, min(SIZES.values())).sum()) for name in SHAPES)
