"""The micro-world's one small table of words, and scenes made of them.

A scene is a grid of 32-px cells, at most one coloured shape in each. What a caption names (shape, colour, size, cell,
background) is an attribute; what no caption names (shade, rotation, sub-cell offset, stripes, mark) is `Detail`, so
that preservation can only be met through image tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

CELL = 32

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
COLORS = {
    "red": (225, 40, 45),
    "green": (45, 165, 65),
    "blue": (50, 85, 225),
    "yellow": (245, 215, 50),
    "purple": (140, 60, 190),
    "orange": (245, 130, 25),
    "pink": (250, 150, 195),
    "cyan": (60, 205, 220),
}
SIZES = {"small": 8.5, "large": 12.0}  # radius in px
BACKGROUNDS = {"white": (250, 250, 250), "black": (18, 18, 18), "gray": (128, 128, 128), "beige": (232, 214, 178)}
STRIPES = ("none", "horizontal", "vertical")
MARKS = ("none", "upper-left", "upper-right", "lower-left", "lower-right")
STRIPE_WEIGHTS = (2, 1, 1)
MARK_WEIGHTS = (2, 1, 1, 1, 1)

SHADE_RANGE = (0.72, 1.0)  # factor on the palette colour
ROTATION_RANGE = (-25.0, 25.0)  # degrees
OFFSET_RANGE = (-1.5, 1.5)  # px from the cell's centre

MOST_CELLS = 6  # along a side; beyond four, places have no names: such pictures are looked at, not spoken of
ROWS = {1: ("middle",), 2: ("top", "bottom"), 3: ("top", "middle", "bottom"), 4: ("top", "upper", "lower", "bottom")}
COLUMNS = {
    1: ("center",),
    2: ("left", "right"),
    3: ("left", "center", "right"),
    4: ("left", "midleft", "midright", "right"),
}

# Never seen in training, in pictures or in words.
HELD_OUT_PAIRS = frozenset(
    {("purple", "star"), ("cyan", "heart"), ("orange", "cross"), ("green", "circle"), ("pink", "triangle")}
)


@dataclass(frozen=True, kw_only=True)
class Detail:
    """What no caption names: shade is a factor, rotation in degrees, dx and dy in px, stripes and mark are words."""

    shade: float = 0.9
    rotation: float = 0.0
    dx: float = 0.0
    dy: float = 0.0
    stripes: str = "none"
    mark: str = "none"


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One coloured shape in a cell (row and column from the top left)."""

    shape: str
    color: str
    size: str
    row: int
    column: int
    detail: Detail = Detail()

    @property
    def cell(self) -> tuple[int, int]:
        return self.row, self.column

    @property
    def pair(self) -> tuple[str, str]:
        return self.color, self.shape

    @property
    def attributes(self) -> tuple[str, str, str, int, int]:
        return self.shape, self.color, self.size, self.row, self.column


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Things in raster order on a background; the canvas is `rows`·32 by `columns`·32 px."""

    background: str
    things: tuple[Thing, ...]
    rows: int = 2
    columns: int = 2

    def __post_init__(self) -> None:
        cells = [thing.cell for thing in self.things]
        if cells != sorted(set(cells)):
            raise ValueError(f"things must stand in raster order, one to a cell, got cells {cells}")

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in px."""
        return self.columns * CELL, self.rows * CELL

    def position(self, thing: Thing) -> str:
        return position_name(thing.row, thing.column, self.rows, self.columns)

    def with_things(self, things: list[Thing] | tuple[Thing, ...], **changes) -> Scene:
        return replace(self, things=tuple(sorted(things, key=lambda thing: thing.cell)), **changes)


def position_name(row: int, column: int, rows: int = 2, columns: int = 2) -> str:
    return f"{ROWS[rows][row]}-{COLUMNS[columns][column]}"


def sample_detail(rng: Random) -> Detail:
    return Detail(
        shade=rng.uniform(*SHADE_RANGE),
        rotation=rng.uniform(*ROTATION_RANGE),
        dx=rng.uniform(*OFFSET_RANGE),
        dy=rng.uniform(*OFFSET_RANGE),
        stripes=rng.choices(STRIPES, STRIPE_WEIGHTS)[0],
        mark=rng.choices(MARKS, MARK_WEIGHTS)[0],
    )


def sample_pair(rng: Random, held_out: bool | None = False) -> tuple[str, str]:
    """A colour and a shape: from training pairs (False), held-out pairs (True) or any (None)."""
    if held_out:
        return rng.choice(sorted(HELD_OUT_PAIRS))
    while True:
        pair = rng.choice(tuple(COLORS)), rng.choice(SHAPES)
        if held_out is None or pair not in HELD_OUT_PAIRS:
            return pair


def sample_thing(rng: Random, cell: tuple[int, int], held_out: bool | None = False, **fixed) -> Thing:
    color, shape = sample_pair(rng, held_out)
    values = {"shape": shape, "color": color, "size": rng.choice(tuple(SIZES)), "detail": sample_detail(rng)}
    return Thing(row=cell[0], column=cell[1], **{**values, **fixed})


def sample_scene(
    rng: Random, *, rows: int = 2, columns: int = 2, count: int | None = None, held_out: bool | None = False
) -> Scene:
    """A random scene of 1..3 things (more on larger canvases); `held_out=True` puts one held-out pair into it."""
    cells = [(row, column) for row in range(rows) for column in range(columns)]
    if count is None:
        few, many = rng.choices((1, 2, 3), (0.25, 0.4, 0.35))[0], len(cells) * 2 // 3
        count = min(few, len(cells)) if len(cells) <= 4 else rng.randint(1, many)
    chosen = sorted(rng.sample(cells, count))
    odd = rng.randrange(count) if held_out else -1
    things = tuple(
        sample_thing(rng, cell, True if index == odd else (None if held_out is None else False))
        for index, cell in enumerate(chosen)
    )
    return Scene(background=rng.choice(tuple(BACKGROUNDS)), things=things, rows=rows, columns=columns)
