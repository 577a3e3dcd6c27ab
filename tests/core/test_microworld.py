import re
from dataclasses import replace
from itertools import product
from random import Random

import numpy as np
import pytest

from unifusion_core.microworld import phrases
from unifusion_core.microworld.caption import caption, parse_caption
from unifusion_core.microworld.edits import OPERATIONS, sample_composition, sample_edit
from unifusion_core.microworld.prompts import KINDS, sample_prompt
from unifusion_core.microworld.render import render_array, render_batch
from unifusion_core.microworld.scene import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT_PAIRS,
    SHAPES,
    SIZES,
    Detail,
    Scene,
    Thing,
    sample_scene,
)
from unifusion_core.microworld.vocabulary import WORD_PATTERN, words

CELLS = tuple(product(range(2), range(2)))


def attributes(scene):
    return scene.background, scene.size, [thing.attributes for thing in scene.things]


def other(options, value):
    return next(option for option in options if option != value)


def pairs(scene):
    return {thing.pair for thing in scene.things}


def test_things_stand_in_raster_order_one_to_a_cell():
    one = Thing(shape="star", color="red", size="small", row=0, column=0)
    two = replace(one, column=1)
    for things in ((two, one), (one, one)):
        with pytest.raises(ValueError):
            Scene(background="white", things=things)
    assert Scene(background="white", things=()).with_things([two, one]).things == (one, two)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 2), (3, 2), (4, 4)])
def test_a_caption_is_parsed_back_to_its_scene(rows, columns):
    rng = Random(0)
    for _ in range(100):
        scene = sample_scene(rng, rows=rows, columns=columns, count=rng.randint(0, rows * columns * 2 // 3))
        assert attributes(parse_caption(caption(scene), rows, columns)) == attributes(scene)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red star",
        "two shapes on a gray background : a small red star at top-left",
        "one shape on a mauve background : a small red star at top-left",
        "one shape on a gray background : a small red star at bottom-middle",
        "two shapes on a gray background : a small red star at top-left , a large red star at top-left",
    ],
)
def test_a_text_that_is_no_caption_is_refused(text):
    with pytest.raises(ValueError):
        parse_caption(text)


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("kind", KINDS)
def test_constraints_accept_the_own_scene_and_no_other(kind, split):
    rng = Random(1)
    for _ in range(150):
        prompt = sample_prompt(rng, kind, split=split, held_out_pair=rng.random() < 0.2)
        scene, constraints = prompt.scene, prompt.constraints
        assert constraints.accepts(scene), prompt
        assert not constraints.accepts(replace(scene, things=scene.things[1:]))
        if constraints.background:
            assert not constraints.accepts(replace(scene, background=other(BACKGROUNDS, scene.background)))
        taken = {thing.cell for thing in scene.things}
        for wanted in constraints.things:
            fitting = [thing for thing in scene.things if wanted.accepts(thing)]
            if len(fitting) > 1:
                continue  # another thing may take its place
            (thing,) = fitting
            changes = [{"shape": other(SHAPES, thing.shape)}]
            changes += [{"color": other(COLORS, thing.color)}] if wanted.color else []
            changes += [{"size": other(SIZES, thing.size)}] if wanted.size else []
            free = [cell for cell in CELLS if cell not in taken] if wanted.cell else []
            changes += [{"row": row, "column": column} for row, column in free]
            rest = [one for one in scene.things if one is not thing]
            for change in changes:
                assert not constraints.accepts(scene.with_things([*rest, replace(thing, **change)])), (prompt, change)


def test_a_relation_is_broken_by_swapping_the_things():
    rng = Random(2)
    seen = set()
    for _ in range(300):
        prompt = sample_prompt(rng, "relation")
        kind, (one, two) = prompt.constraints.relation[0], prompt.scene.things
        swapped = prompt.scene.with_things(
            [replace(one, row=two.row, column=two.column), replace(two, row=one.row, column=one.column)]
        )
        if kind != "diagonal" and one.shape != two.shape:
            assert not prompt.constraints.accepts(swapped), prompt
        seen.add(kind)
    assert seen == set(phrases.RELATIONS)


def test_training_never_shows_a_held_out_pair():
    rng = Random(3)
    for _ in range(400):
        shown = [sample_scene(rng), *(sample_prompt(rng, kind).scene for kind in KINDS)]
        for operation in OPERATIONS:
            edit = sample_edit(rng, operation)
            shown += [edit.source, edit.target]
        composition = sample_composition(rng)
        shown += [*composition.references, composition.target]
        assert not any(pairs(scene) & HELD_OUT_PAIRS for scene in shown)


def test_training_never_names_a_held_out_pair():
    rng = Random(4)
    named = re.compile("|".join(rf"\b{color} ({shape}|{phrases.PLURALS[shape]})\b" for color, shape in HELD_OUT_PAIRS))
    for _ in range(1000):
        texts = [sample_prompt(rng, kind).text for kind in KINDS]
        texts += [sample_edit(rng).instruction, sample_composition(rng).instruction]
        assert not any(named.search(text) for text in texts)


def test_held_out_prompts_and_scenes_show_a_held_out_pair():
    rng = Random(5)
    for _ in range(100):
        assert pairs(sample_scene(rng, held_out=True)) & HELD_OUT_PAIRS
        for kind in KINDS:
            prompt = sample_prompt(rng, kind, held_out_pair=True)
            asked = {(wanted.color, wanted.shape) for wanted in prompt.constraints.things}
            assert asked & HELD_OUT_PAIRS, prompt
        assert pairs(sample_edit(rng, held_out_pair=True).source) & HELD_OUT_PAIRS


def test_training_never_asks_indirectly_for_the_last_of_three():
    rng = Random(6)
    facts = {fact for table in (phrases.SHAPE_FACTS, phrases.COLOR_FACTS) for group in table.values() for fact in group}
    three = 0
    for _ in range(1500):
        prompt = sample_prompt(rng, "indirect")
        if len(prompt.scene.things) < 3:
            continue
        three += 1
        assert prompt.asked < 2
        last = prompt.text.rsplit(" and ", 1)[1]  # the background may follow, by facts of its own
        assert not any(fact in last for fact in facts), prompt.text
    assert three > 300
    assert all(sample_prompt(rng, "indirect", late=True).asked == 2 for _ in range(50))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_edit_keeps_what_it_does_not_name(operation):
    rng = Random(7)
    for _ in range(150):
        edit = sample_edit(rng, operation)
        source, target = edit.source, edit.target
        kept = len(source.things) - (operation not in ("add", "background"))
        assert len(edit.untouched) == kept
        assert (source.background == target.background) == (operation != "background")
        before = [thing for thing in source.things if thing not in target.things]
        after = [thing for thing in target.things if thing not in source.things]
        if operation == "add":
            assert not before and len(after) == 1
        elif operation in ("remove", "background"):
            assert not after
        else:
            (before,), (after,) = before, after
            fields = {"recolor": ("color",), "resize": ("size",), "reshape": ("shape",), "move": ("row", "column")}
            changed = {name: getattr(after, name) for name in fields[operation]}
            assert replace(before, **changed) == after


def test_a_composition_shows_one_thing_of_each_picture_as_it_was():
    rng = Random(8)
    for _ in range(200):
        composition = sample_composition(rng)
        one, two = composition.references
        assert composition.target.background == one.background
        first, second = composition.target.things
        assert (first in one.things and second in two.things) or (first in two.things and second in one.things)


def test_the_vocabulary_covers_every_text():
    rng = Random(9)
    known = set(words())
    texts = [text for group in phrases.CAPTION_PATTERNS.values() for text in group]
    for index in range(5000):
        split = ("train", "held_out")[index % 2]
        held_out = index % 5 == 0
        prompt = sample_prompt(rng, KINDS[index % len(KINDS)], split=split, held_out_pair=held_out)
        texts += [prompt.text, caption(prompt.scene), sample_edit(rng, split=split, held_out_pair=held_out).instruction]
        if index % 10 == 0:
            texts.append(sample_composition(rng, split=split).instruction)
            texts.append(caption(sample_scene(rng, rows=rng.randint(1, 4), columns=rng.randint(1, 4), count=1)))
    assert {word for text in texts for word in re.findall(WORD_PATTERN, text)} <= known
    assert len(words()) == len(known)


def test_held_out_sentence_patterns_are_never_trained_on():
    tables = [phrases.SCENE_PATTERNS, phrases.CAPTION_PATTERNS, phrases.COMPOSE_PATTERNS]
    tables += phrases.EDIT_PATTERNS.values()
    for table in tables:
        assert table["train"] and table["held_out"]
        assert not set(table["train"]) & set(table["held_out"])


def test_held_out_sentence_patterns_recombine_trained_words():
    tables = (
        phrases.SCENE_PATTERNS,
        phrases.CAPTION_PATTERNS,
        phrases.COMPOSE_PATTERNS,
        *phrases.EDIT_PATTERNS.values(),
    )

    def used(split):
        texts = (re.sub(r"\{\w+\}", " ", text) for table in tables for text in table[split])
        return {word for text in texts for word in re.findall(WORD_PATTERN, text)}

    facts = (phrases.SHAPE_FACTS, phrases.COLOR_FACTS, phrases.BACKGROUND_FACTS, phrases.RELATIONS)
    trained = used("train") | {w for table in facts for texts in table.values() for text in texts for w in text.split()}
    assert not used("held_out") - trained


def test_sampling_follows_the_seed():
    def texts():
        rng = Random(10)
        return [sample_prompt(rng, kind).text for kind in KINDS] + [sample_edit(rng).instruction]

    assert texts() == texts()


def test_rendering_is_deterministic():
    rng = Random(11)
    scenes = [sample_scene(rng) for _ in range(8)]
    batch = render_batch(scenes)
    assert batch.shape == (8, 64, 64, 3) and batch.dtype == np.uint8
    assert np.array_equal(batch, render_batch(scenes))
    assert np.array_equal(batch[3], render_array(scenes[3]))


@pytest.mark.parametrize(
    "change",
    [
        {"shade": 0.8},
        {"rotation": 10.0},
        {"dx": 0.5},
        {"dy": -0.5},
        {"stripes": "horizontal"},
        {"stripes": "vertical"},
        {"mark": "upper-left"},
        {"mark": "lower-right"},
    ],
)
def test_every_detail_shows_in_the_pixels(change):
    for shape, size in product(SHAPES, SIZES):
        thing = Thing(shape=shape, color="red", size=size, row=0, column=0)
        plain = Scene(background="gray", things=(thing,), rows=1, columns=1)
        changed = replace(plain, things=(replace(thing, detail=replace(Detail(), **change)),))
        same = np.array_equal(render_array(plain), render_array(changed))
        assert same == (shape == "circle" and "rotation" in change)


def test_a_thing_stays_within_its_cell():
    thing = Thing(
        shape="star", color="red", size="large", row=1, column=0, detail=Detail(dx=1.5, dy=-1.5, rotation=20.0)
    )
    array = render_array(Scene(background="white", things=(thing,)))
    background = np.asarray(BACKGROUNDS["white"])
    assert (array[:32] == background).all() and (array[:, 32:] == background).all()
    assert (array[32:, :32] != background).any()
