"""Prompts → pictures: how far these show what was asked for, by what the oracle reads off them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from random import Random
from statistics import fmean

from PIL import Image

from ..conditioning.vlm import Request
from ..evaluation.micro import MAX_NEW_TOKENS, draw, score_scenes, things_at
from ..microworld.oracle import read
from ..microworld.prompts import KINDS, Constraints, Prompt, Wanted, related, sample_prompt
from ..microworld.scene import Scene, Thing
from ..pipeline import Conditions, UniFusion
from .data import described
from .measured import Measured, following, held_out

NAMED = ("shape", "color", "size")  # of a thing at its cell
Conditioner = Callable[[UniFusion, list[str]], Conditions]


def own_words(model: UniFusion, prompts: list[str]) -> Conditions:
    return model.prepare([Request(prompt) for prompt in prompts], rewriting=False)


def rewritten(model: UniFusion, prompts: list[str]) -> Conditions:
    return model.prepare([Request(prompt) for prompt in prompts], max_new_tokens=MAX_NEW_TOKENS)


def prompts(model: UniFusion, seed: int, num: int) -> Measured:
    """Prompts that name everything, by the user's own words: `following`, `exact`, and each attribute."""
    return _prompts(model, seed, num, own_words)


def rewrites(model: UniFusion, seed: int, num: int) -> Measured:
    """The same by VERIFI."""
    return _prompts(model, seed, num, rewritten)


def late(model: UniFusion, seed: int, num: int) -> Measured:
    """Prompts of three things in any order: `first` and `last`, how much of what is mentioned so is right; their gap.

    A thing scores the share of its shape, colour and size that are right at its cell.
    """
    found = Measured()
    for cases, noise in held_out("late", _three, seed, num):
        pictures = draw(model, own_words(model, [case.text for case in cases]), noise)
        _score(found, pictures, cases)
        for picture, case in zip(pictures, cases, strict=True):
            there = things_at(read(picture))
            first, *_, last = (_right(there.get(wanted.cell), wanted) for wanted in case.constraints.things)
            found.add({"first": [first], "last": [last], "gap": [first - last]})
    return found


def kinds_own_words(model: UniFusion, seed: int, num: int) -> Measured:
    """Prompts of every kind by the user's own words: under each kind the share of its wishes that are met."""
    return _kinds(model, seed, num, own_words)


def kinds_rewritten(model: UniFusion, seed: int, num: int) -> Measured:
    """The same by VERIFI."""
    return _kinds(model, seed, num, rewritten)


def share_met(constraints: Constraints, scene: Scene) -> float:
    """How many of a prompt's wishes a picture meets, of all: each attribute, the number of things, the background, the
    relation; under the assignment of things to wishes that meets most."""
    things: list[Thing | None] = list(scene.things)
    things += [None] * (len(constraints.things) - len(things))
    best = max(_met(constraints, order) for order in permutations(things, len(constraints.things)))
    best += len(scene.things) == len(constraints.things)
    best += constraints.background == scene.background
    wishes = sum(len(_wishes(wanted)) for wanted in constraints.things)
    return best / (wishes + 1 + (constraints.background is not None) + (constraints.relation is not None))


def _met(constraints: Constraints, order: tuple[Thing | None, ...]) -> int:
    pairs = zip(constraints.things, order, strict=True)
    met = sum(getattr(thing, name) == wish for wanted, thing in pairs if thing for name, wish in _wishes(wanted))
    if constraints.relation is not None:
        kind, one, other = constraints.relation
        met += bool(order[one] and order[other]) and related(kind, order[one], order[other])
    return met


def _wishes(wanted: Wanted) -> list[tuple[str, object]]:
    named = [(name, getattr(wanted, name)) for name in (*NAMED, "cell")]
    return [(name, wish) for name, wish in named if wish is not None]


def _right(thing: Thing | None, wanted: Wanted) -> float:
    return fmean(thing is not None and getattr(thing, name) == getattr(wanted, name) for name in NAMED)


def _described(rng: Random, _: int, odd: bool) -> Prompt:
    return described(rng, split="held_out", held_out_pair=odd)


def _three(rng: Random, index: int, odd: bool) -> Prompt:
    while True:
        case = _described(rng, index, odd)
        if len(case.scene.things) == 3:
            return case


def _prompts(model: UniFusion, seed: int, num: int, condition: Conditioner) -> Measured:
    found = Measured()
    for cases, noise in held_out("prompts", _described, seed, num):
        _score(found, draw(model, condition(model, [case.text for case in cases]), noise), cases)
    return found


def _score(found: Measured, pictures: list[Image.Image], cases: list[Prompt]) -> None:
    found.add(following(score_scenes(pictures, [case.scene for case in cases])))
    found.entitle([case.text for case in cases])
    found.show("", pictures)


def _kinds(model: UniFusion, seed: int, num: int, condition: Conditioner) -> Measured:
    """Half as many prompts of each kind; shows one or two of each."""
    found = Measured()
    for number, kind in enumerate(KINDS):

        def make(rng: Random, _: int, odd: bool, kind: str = kind) -> Prompt:
            return sample_prompt(rng, kind, split="held_out", held_out_pair=odd)

        for cases, noise in held_out(f"kinds.{kind}", make, seed, max(1, num // 2)):
            pictures = draw(model, condition(model, [case.text for case in cases]), noise)
            scenes = [read(picture).scene for picture in pictures]
            pairs = list(zip((case.constraints for case in cases), scenes, strict=True))
            found.add({kind: [share_met(*pair) for pair in pairs], f"{kind}.exact": [a.accepts(b) for a, b in pairs]})
            if len(found.titles) <= number:
                found.entitle([cases[0].text])
                found.show("", pictures[:1])
    return found
