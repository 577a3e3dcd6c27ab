"""Edits with before and after, and compositions of two pictures.

An edit changes only what it names: the detail of everything else, and what remains of the edited thing, is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from .phrases import BACKGROUND_FACTS, COLOR_FACTS, COMPOSE_PATTERNS, EDIT_PATTERNS, SHAPE_FACTS, SIZE_WORDS, article
from .scene import BACKGROUNDS, COLORS, HELD_OUT_PAIRS, SHAPES, Scene, Thing, sample_scene, sample_thing

OPERATIONS = ("recolor", "remove", "add", "move", "resize", "reshape", "background")
_OTHER_SIZE = {"small": "large", "large": "small"}


@dataclass(frozen=True, kw_only=True)
class Edit:
    """An instruction on a source scene, and the target; `indirect` if it refers by facts."""

    operation: str
    instruction: str
    source: Scene
    target: Scene
    indirect: bool

    @property
    def untouched(self) -> tuple[Thing, ...]:
        """Things that stand in both pictures, equal to the last detail."""
        return tuple(thing for thing in self.target.things if thing in self.source.things)


@dataclass(frozen=True, kw_only=True)
class Composition:
    """Two reference scenes, an instruction, and the target: one thing of each on the first one's background."""

    instruction: str
    references: tuple[Scene, Scene]
    target: Scene


def sample_edit(
    rng: Random, operation: str | None = None, *, split: str = "train", held_out_pair: bool = False
) -> Edit:
    operation = operation or rng.choice(OPERATIONS)
    while True:
        count = rng.choices((1, 2, 3), (0.2, 0.45, 0.35))[0]
        source = sample_scene(rng, count=count, held_out=held_out_pair)
        edit = _apply(rng, operation, source, split)
        if edit is not None:
            return edit


def sample_composition(rng: Random, *, split: str = "train", held_out_pair: bool = False) -> Composition:
    while True:
        one = sample_scene(rng, count=rng.choice((1, 2, 2, 3)), held_out=held_out_pair)
        two = sample_scene(rng, count=rng.choice((1, 2, 2, 3)))
        first, second = rng.choice(one.things), rng.choice(two.things)
        names = _reference(rng, one, first, 0.3), _reference(rng, two, second, 0.3)
        if first.cell == second.cell or None in names:
            continue
        text = rng.choice(COMPOSE_PATTERNS[split]).format(one=names[0][0], two=names[1][0])
        return Composition(instruction=text, references=(one, two), target=one.with_things((first, second)))


def _reference(rng: Random, scene: Scene, thing: Thing, indirect: float) -> tuple[str, bool] | None:
    """A phrase that fits this thing alone (and whether it needs knowledge); None if nothing does."""
    others = [other for other in scene.things if other is not thing]
    ways: list[tuple[str, bool]] = [(f"the thing at {scene.position(thing)}", False)]
    if all(other.shape != thing.shape for other in others):
        ways += [(f"the {thing.shape}", False)] * 2 + [(f"the {rng.choice(SHAPE_FACTS[thing.shape])}", True)]
    if all(other.color != thing.color for other in others):
        ways += [
            (f"the {thing.color} thing", False),
            (f"the thing in the {rng.choice(COLOR_FACTS[thing.color])}", True),
        ]
    if all(other.pair != thing.pair for other in others):
        ways += [(f"the {thing.color} {thing.shape}", False)] * 2
    if others and all(other.size != thing.size for other in others):
        ways += [(f"the {rng.choice(SIZE_WORDS[thing.size])} thing", False)]
    wanted = rng.random() < indirect
    fitting = [way for way in ways if way[1] == wanted]
    return rng.choice(fitting or ways)


def _apply(rng: Random, operation: str, source: Scene, split: str) -> Edit | None:
    pattern = rng.choice(EDIT_PATTERNS[operation][split])
    thing = rng.choice(source.things)
    reference, indirect = _reference(rng, source, thing, 0.35)
    taken = {other.cell for other in source.things}
    free = [(r, c) for r in range(source.rows) for c in range(source.columns) if (r, c) not in taken]
    rest = [other for other in source.things if other is not thing]

    def edit(target: Scene, **words: str) -> Edit:
        text = pattern.format(ref=reference, **words)
        return Edit(operation=operation, instruction=text, source=source, target=target, indirect=indirect)

    if operation == "recolor":
        colors = [c for c in COLORS if c != thing.color and (c, thing.shape) not in HELD_OUT_PAIRS]
        color = rng.choice(colors)
        new = color
        if rng.random() < 0.3:
            new, indirect = f"the {rng.choice(COLOR_FACTS[color])}", True
        return edit(source.with_things([*rest, replace(thing, color=color)]), new=new)
    if operation == "remove":
        return edit(source.with_things(rest)) if rest else None
    if operation == "add":
        if not free:
            return None
        added = sample_thing(rng, rng.choice(free))
        indirect = rng.random() < 0.3
        if indirect:
            name = f"{added.size} {added.color}"
            new = f"{article(name)} {name} thing with the {rng.choice(SHAPE_FACTS[added.shape])}"
        else:
            name = f"{rng.choice(SIZE_WORDS[added.size])} {added.color} {added.shape}"
            new = f"{article(name)} {name}"
        return edit(source.with_things([*source.things, added]), new=new, position=source.position(added))
    if operation == "move":
        if not free:
            return None
        row, column = rng.choice(free)
        moved = replace(thing, row=row, column=column)
        return edit(source.with_things([*rest, moved]), position=source.position(moved))
    if operation == "resize":
        size = _OTHER_SIZE[thing.size]
        return edit(source.with_things([*rest, replace(thing, size=size)]), new=rng.choice(SIZE_WORDS[size]))
    if operation == "reshape":
        shape = rng.choice([s for s in SHAPES if s != thing.shape and (thing.color, s) not in HELD_OUT_PAIRS])
        new = f"a {shape}"
        if rng.random() < 0.3:
            new, indirect = f"the {rng.choice(SHAPE_FACTS[shape])}", True
        return edit(source.with_things([*rest, replace(thing, shape=shape)]), new=new)
    background = rng.choice([b for b in BACKGROUNDS if b != source.background])
    indirect = rng.random() < 0.3
    new = f"the {rng.choice(BACKGROUND_FACTS[background])}" if indirect else background
    return edit(replace(source, background=background), new=new)
