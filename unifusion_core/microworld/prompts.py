"""Prompts as people write them, each with the constraints that a rewrite or a picture must meet.

Kinds: `full` names everything, `short` drops attributes, `indirect` needs knowledge, `count` needs arithmetic or
facts, `relation` places things by each other. A prompt leaves freedom, so it is scored by constraints, never by
equality with the scene it was made from.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from random import Random

from .caption import NUMBERS
from .phrases import (
    BACKGROUND_FACTS,
    COLOR_FACTS,
    COUNT_FACTS,
    PLURALS,
    RELATIONS,
    SCENE_PATTERNS,
    SHAPE_FACTS,
    SIZE_WORDS,
    article,
)
from .scene import HELD_OUT_PAIRS, Scene, Thing, sample_pair, sample_scene, sample_thing

KINDS = ("full", "short", "indirect", "count", "relation")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a prompt asks of one thing; None leaves it free."""

    shape: str | None = None
    color: str | None = None
    size: str | None = None
    cell: tuple[int, int] | None = None

    def accepts(self, thing: Thing) -> bool:
        return all(
            wish is None or wish == fact
            for wish, fact in (
                (self.shape, thing.shape),
                (self.color, thing.color),
                (self.size, thing.size),
                (self.cell, thing.cell),
            )
        )


@dataclass(frozen=True, kw_only=True)
class Constraints:
    """What a prompt asks of a scene: exactly these things, perhaps a background, perhaps one relation."""

    things: tuple[Wanted, ...]
    background: str | None = None
    relation: tuple[str, int, int] | None = None

    def accepts(self, scene: Scene) -> bool:
        if len(scene.things) != len(self.things) or self.background not in (None, scene.background):
            return False
        return any(
            all(wanted.accepts(thing) for wanted, thing in zip(self.things, order, strict=True))
            and (self.relation is None or related(self.relation[0], order[self.relation[1]], order[self.relation[2]]))
            for order in permutations(scene.things)
        )


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt, what it demands, one scene that meets it, and which mentioned thing was asked for indirectly."""

    kind: str
    text: str
    constraints: Constraints
    scene: Scene
    asked: int | None = None


def related(kind: str, first: Thing, second: Thing) -> bool:
    """Whether `first` stands `kind` of `second`: in one row, in one column, or in opposite corners."""
    if kind == "left":
        return first.row == second.row and first.column < second.column
    if kind == "right":
        return first.row == second.row and first.column > second.column
    if kind == "above":
        return first.column == second.column and first.row < second.row
    if kind == "below":
        return first.column == second.column and first.row > second.row
    return first.row != second.row and first.column != second.column


def sample_prompt(
    rng: Random,
    kind: str,
    *,
    split: str = "train",
    held_out_pair: bool = False,
    late: bool = False,
    rows: int = 2,
    columns: int = 2,
) -> Prompt:
    """One prompt of a kind.

    Args:
        split: which sentence patterns, "train" or "held_out".
        held_out_pair: put a colour-and-shape pair into it that training never sees.
        late: (kind "indirect") three things with the one asked for indirectly mentioned last, never so in training.
    """
    maker = {"full": _full, "short": _short, "indirect": _indirect, "count": _count, "relation": _relation}[kind]
    if kind == "indirect":
        return maker(rng, split, held_out_pair, rows, columns, late)
    return maker(rng, split, held_out_pair, rows, columns)


def sentence(rng: Random, things: str, on: str, split: str) -> str:
    return " ".join(rng.choice(SCENE_PATTERNS[split]).format(things=things, on=on).split())


def position_phrase(rng: Random, scene: Scene, thing: Thing) -> str:
    name = scene.position(thing)
    spaced = name.replace("-", " ")
    return rng.choice((f"at {name}", f"in the {name} corner", name, f"at the {spaced}", f"in the {spaced} corner"))


def background_phrase(rng: Random, background: str, indirect: bool = False) -> str:
    if indirect:
        return f"on a background in the {rng.choice(BACKGROUND_FACTS[background])}"
    return rng.choice((f"on a {background} background", f"on {background}", f"on a {background} canvas"))


def thing_phrase(rng: Random, scene: Scene, thing: Thing, keep: set[str], *, indirect: bool = False) -> str:
    """A noun phrase that names the kept attributes (shape is always kept), by facts where `indirect`."""
    size = rng.choice(SIZE_WORDS[thing.size]) if "size" in keep else ""
    position = position_phrase(rng, scene, thing) if "cell" in keep else ""
    if not indirect:
        words = f"{size} {thing.color if 'color' in keep else ''} {thing.shape}".split()
        return f"{article(words[0])} {' '.join(words)} {position}".strip()
    by_fact = {"color", "shape"} if rng.random() < 0.5 else {rng.choice(("color", "shape"))}
    noun = f"the {rng.choice(SHAPE_FACTS[thing.shape])}" if "shape" in by_fact else f"a {thing.shape}"
    if "color" not in keep:
        hue = ""
    elif "color" in by_fact:
        hue = f"in the {rng.choice(COLOR_FACTS[thing.color])}"
    else:
        hue = f"in {thing.color}"
    if "color" in by_fact and "color" not in keep:
        noun = f"the {rng.choice(SHAPE_FACTS[thing.shape])}"
    if size:
        noun = noun.replace("the ", f"the {size} ", 1) if noun.startswith("the ") else noun.replace("a ", f"a {size} ")
    return " ".join(f"{noun} {hue} {position}".split())


def _listed(rng: Random, phrases: list[str]) -> str:
    if len(phrases) == 1:
        return phrases[0]
    return " and ".join(phrases) if rng.random() < 0.5 else f"{' , '.join(phrases[:-1])} and {phrases[-1]}"


def _wanted(thing: Thing, keep: set[str]) -> Wanted:
    return Wanted(
        shape=thing.shape if "shape" in keep else None,
        color=thing.color if "color" in keep else None,
        size=thing.size if "size" in keep else None,
        cell=thing.cell if "cell" in keep else None,
    )


def _subset(rng: Random, chance: float) -> set[str]:
    return {"shape"} | {name for name in ("color", "size", "cell") if rng.random() < chance}


def _shuffled(rng: Random, scene: Scene) -> list[Thing]:
    return rng.sample(scene.things, len(scene.things))


def _full(rng: Random, split: str, held_out: bool, rows: int, columns: int) -> Prompt:
    scene = sample_scene(rng, rows=rows, columns=columns, held_out=held_out)
    keep = {"shape", "color", "size", "cell"}
    things = _shuffled(rng, scene)
    text = sentence(
        rng,
        _listed(rng, [thing_phrase(rng, scene, t, keep) for t in things]),
        background_phrase(rng, scene.background),
        split,
    )
    return Prompt(
        kind="full",
        text=text,
        scene=scene,
        constraints=Constraints(things=tuple(_wanted(t, keep) for t in things), background=scene.background),
    )


def _short(rng: Random, split: str, held_out: bool, rows: int, columns: int) -> Prompt:
    scene = sample_scene(rng, rows=rows, columns=columns, held_out=held_out)
    things = _shuffled(rng, scene)
    keeps = [_subset(rng, 0.5) | ({"color"} if held_out else set()) for _ in things]
    on = rng.random() < 0.4
    phrases = [thing_phrase(rng, scene, t, keep) for t, keep in zip(things, keeps, strict=True)]
    if rng.random() < 0.3:  # terse: no articles, no sentence
        text = " , ".join(p.split(" ", 1)[1] for p in phrases) + (f" , {scene.background} background" if on else "")
    else:
        text = sentence(rng, _listed(rng, phrases), background_phrase(rng, scene.background) if on else "", split)
    return Prompt(
        kind="short",
        text=text,
        scene=scene,
        constraints=Constraints(
            things=tuple(_wanted(t, keep) for t, keep in zip(things, keeps, strict=True)),
            background=scene.background if on else None,
        ),
    )


def _indirect(rng: Random, split: str, held_out: bool, rows: int, columns: int, late: bool) -> Prompt:
    scene = sample_scene(rng, rows=rows, columns=columns, held_out=held_out, count=3 if late else None)
    things = _shuffled(rng, scene)
    if late:
        asked = 2
    elif len(things) == 3:
        asked = rng.randrange(2)
    else:
        asked = rng.randrange(len(things))
    keeps = [_subset(rng, 0.5) | ({"color"} if held_out or index == asked else set()) for index in range(len(things))]
    also = rng.random() < 0.3 and not late
    phrases = [
        thing_phrase(
            rng,
            scene,
            t,
            keep,
            indirect=index == asked or (also and not (len(things) >= 3 and index == len(things) - 1)),
        )
        for index, (t, keep) in enumerate(zip(things, keeps, strict=True))
    ]
    on = rng.random() < 0.5
    ground = background_phrase(rng, scene.background, indirect=rng.random() < 0.5) if on else ""
    return Prompt(
        kind="indirect",
        text=sentence(rng, _listed(rng, phrases), ground, split),
        scene=scene,
        constraints=Constraints(
            things=tuple(_wanted(t, keep) for t, keep in zip(things, keeps, strict=True)),
            background=scene.background if on else None,
        ),
        asked=asked,
    )


def _count(rng: Random, split: str, held_out: bool, rows: int, columns: int) -> Prompt:
    number = rng.choices((1, 2, 3, 4), (1, 3, 3, 2))[0]
    color, shape = sample_pair(rng, held_out)
    base = sample_scene(rng, rows=rows, columns=columns, count=number)
    things = tuple(sample_thing(rng, thing.cell, shape=shape, color=color) for thing in base.things)
    scene = Scene(background=base.background, things=things, rows=rows, columns=columns)
    keep = {"shape", "color"} if held_out or rng.random() < 0.8 else {"shape"}
    noun = f"{color if 'color' in keep else ''} {PLURALS[shape] if number > 1 else shape}".strip()
    many = f"{color if 'color' in keep else ''} {PLURALS[shape]}".strip()
    ways = [f"{NUMBERS[number]} {noun}"]
    ways += [f"{NUMBERS[a]} plus {NUMBERS[number - a]} {many}" for a in range(1, number)]
    ways += [f"{NUMBERS[number + a]} minus {NUMBERS[a]} {many}" for a in (1, 2) if number + a <= 4]
    ways += [f"as many {many} as {fact}" for fact in COUNT_FACTS[number]]
    on = rng.random() < 0.4
    return Prompt(
        kind="count",
        text=sentence(rng, rng.choice(ways), background_phrase(rng, scene.background) if on else "", split),
        scene=scene,
        constraints=Constraints(
            things=tuple(_wanted(thing, keep) for thing in things), background=scene.background if on else None
        ),
    )


def _relation(rng: Random, split: str, held_out: bool, rows: int, columns: int) -> Prompt:
    while True:
        scene = sample_scene(rng, rows=rows, columns=columns, count=2, held_out=held_out)
        first, second = _shuffled(rng, scene)
        kinds = [kind for kind in RELATIONS if related(kind, first, second)]
        if kinds:
            break
    kind = rng.choice(kinds)
    same = rng.random() < 0.3 and not held_out and (first.color, second.shape) not in HELD_OUT_PAIRS
    if same:
        second = sample_thing(rng, second.cell, shape=second.shape, color=first.color, size=second.size)
        scene = scene.with_things((first, second))
    keeps = [_subset(rng, 0.5) - {"cell"} | {"color"} for _ in range(2)]
    one = thing_phrase(rng, scene, first, keeps[0])
    two = thing_phrase(rng, scene, second, keeps[1] - {"color"} if same else keeps[1])
    on = rng.random() < 0.4
    return Prompt(
        kind="relation",
        text=sentence(
            rng,
            f"{one} {rng.choice(RELATIONS[kind])} {two}{' of the same color' if same else ''}",
            background_phrase(rng, scene.background) if on else "",
            split,
        ),
        scene=scene,
        constraints=Constraints(
            things=(_wanted(first, keeps[0]), _wanted(second, keeps[1])),
            background=scene.background if on else None,
            relation=(kind, 0, 1),
        ),
    )
