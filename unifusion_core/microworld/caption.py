"""Scenes ↔ canonical captions: the one long form that VERIFI writes and the DiT was trained on."""

from __future__ import annotations

from .scene import BACKGROUNDS, COLORS, COLUMNS, ROWS, SHAPES, SIZES, Scene, Thing, position_name

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
POSITIONS = tuple(
    dict.fromkeys(
        position_name(row, column, rows, columns)
        for rows in ROWS
        for columns in COLUMNS
        for row in range(rows)
        for column in range(columns)
    )
)


def caption(scene: Scene) -> str:
    """`two shapes on a gray background : a small pink star at top-left , a large red heart at bottom-right`."""
    count = len(scene.things)
    head = f"{NUMBERS[count]} {'shape' if count == 1 else 'shapes'} on a {scene.background} background"
    things = [f"a {t.size} {t.color} {t.shape} at {scene.position(t)}" for t in scene.things]
    return f"{head} : {' , '.join(things)}" if things else head


def parse_caption(text: str, rows: int = 2, columns: int = 2) -> Scene:
    """The scene a canonical caption names, with default detail.

    Raises:
        ValueError: the text is not canonical, names a cell twice or one that the canvas lacks, or miscounts.
    """
    head, _, tail = text.strip().partition(" : ")
    words = head.split()
    if len(words) != 6 or words[2:4] != ["on", "a"] or words[0] not in NUMBERS or words[4] not in BACKGROUNDS:
        raise ValueError(f"not a canonical caption: {text!r}")
    cells = {position_name(r, c, rows, columns): (r, c) for r in range(rows) for c in range(columns)}
    things = [_parse_thing(part.split(), cells, text) for part in tail.split(" , ")] if tail else []
    if len(things) != NUMBERS.index(words[0]):
        raise ValueError(f"the caption counts {words[0]} shapes but lists {len(things)}: {text!r}")
    return Scene(
        background=words[4],
        things=tuple(sorted(things, key=lambda thing: thing.cell)),
        rows=rows,
        columns=columns,
    )


def _parse_thing(words: list[str], cells: dict[str, tuple[int, int]], text: str) -> Thing:
    if len(words) != 6 or words[0] != "a" or words[4] != "at":
        raise ValueError(f"cannot read {' '.join(words)!r} in the caption {text!r}")
    _, size, color, shape, _, position = words
    if size not in SIZES or color not in COLORS or shape not in SHAPES or position not in cells:
        raise ValueError(f"cannot read {' '.join(words)!r} in the caption {text!r}")
    return Thing(shape=shape, color=color, size=size, row=cells[position][0], column=cells[position][1])
