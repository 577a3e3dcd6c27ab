from dataclasses import replace
from random import Random

import numpy as np
import pytest
from PIL import Image, ImageFilter

from unifusion_core.microworld.oracle import attribute_scores, detail_scores, exact, read
from unifusion_core.microworld.render import render, render_array
from unifusion_core.microworld.scene import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    Detail,
    Scene,
    Thing,
    sample_detail,
    sample_scene,
)


def scenes(seed, count, rows=2, columns=2):
    rng = Random(seed)
    return [sample_scene(rng, rows=rows, columns=columns, held_out=None) for _ in range(count)]


def spoiled(scene, rng, blur=0.7, noise=6.0):
    blurred = np.asarray(render(scene).filter(ImageFilter.GaussianBlur(blur)), np.float32)
    return np.clip(np.rint(blurred + rng.normal(0.0, noise, blurred.shape)), 0, 255).astype(np.uint8)


def detail_shares(readings, wanted):
    pairs = [
        detail_scores(got.thing, true)
        for reading, scene in zip(readings, wanted, strict=True)
        for got, true in zip(reading.things, scene.things, strict=True)
    ]
    return {name: sum(pair[name] for pair in pairs) / len(pairs) for name in pairs[0]}


def lone(shape="star", color="red", size="large", cell=(0, 0), background="gray", **detail):
    thing = Thing(shape=shape, color=color, size=size, row=cell[0], column=cell[1], detail=Detail(**detail))
    return Scene(background=background, things=(thing,))


def test_own_renders_are_read_exactly_with_their_detail():
    wanted = scenes(1, 160) + scenes(2, 10, 4, 4) + scenes(3, 10, 2, 3) + scenes(4, 4, 6, 6)
    readings = [read(render(scene)) for scene in wanted]
    right = [(reading, scene) for reading, scene in zip(readings, wanted, strict=True) if exact(reading, scene)]
    assert len(right) >= 0.995 * len(wanted)
    shares = detail_shares(*zip(*right, strict=True))
    assert min(shares.values()) >= 0.995, shares
    assert np.median([reading.confidence for reading in readings]) > 0.9


def test_blurred_and_noisy_renders_are_read_exactly():
    rng = np.random.default_rng(4)
    wanted = scenes(4, 120) + scenes(5, 10, 4, 4)
    readings = [read(spoiled(scene, rng)) for scene in wanted]
    right = [(reading, scene) for reading, scene in zip(readings, wanted, strict=True) if exact(reading, scene)]
    assert len(right) >= 0.98 * len(wanted)
    shares = detail_shares(*zip(*right, strict=True))
    assert min(shares.values()) >= 0.98, shares


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_and_colour_is_read_on_every_background(shape):
    rng = Random(6)
    for background in BACKGROUNDS:
        for color in COLORS:
            thing = Thing(shape=shape, color=color, size="small", row=0, column=0, detail=sample_detail(rng))
            scene = Scene(background=background, things=(thing,), rows=1, columns=1)
            assert exact(read(render(scene)), scene), scene


def test_pictures_and_arrays_read_alike():
    scene = scenes(7, 1)[0]
    array = render_array(scene)
    one = read(Image.fromarray(array))
    assert read(array) == one
    other = read(array.astype(np.float32) / 255)
    assert exact(other, scene)
    assert exact(one.scene, scene)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_an_empty_canvas_has_no_things(background):
    scene = Scene(background=background, things=(), rows=2, columns=3)
    reading = read(render(scene))
    assert reading.things == () and exact(reading, scene)
    assert reading.confidence == 1.0


def test_garbage_is_read_without_confidence():
    rng = np.random.default_rng(8)
    blobs = np.kron(rng.random((8, 8, 3)), np.ones((8, 8, 1)))
    single = np.where(rng.random((32, 32, 1)) < 0.3, [0.9, 0.1, 0.1], [1.0, 1.0, 1.0])
    for picture in (rng.random((64, 64, 3)), blobs, single, np.full((32, 32, 3), np.nan)):
        reading = read(picture)
        assert reading.confidence < 0.1 or not reading.things
        assert all(0.0 <= thing.confidence < 0.1 and thing.error > 0.05 for thing in reading.things)
        assert reading.scene.rows == picture.shape[0] // 32


def test_specks_are_no_things():
    picture = render_array(Scene(background="white", things=()))
    picture[4:9, 4:9] = COLORS["red"]
    assert read(picture).things == ()


def test_a_thing_between_the_sizes_is_read_as_the_nearest():
    def ring(radius):
        y, x = np.mgrid[:32, :32] - 15.5
        cover = np.clip(0.5 + 0.98 * radius - np.hypot(x, y), 0, 1)[..., None]
        return (250 + cover * (np.asarray(COLORS["blue"]) - 250)).astype(np.uint8)

    for radius, size in ((7.5, "small"), (9.5, "small"), (11.0, "large"), (13.0, "large")):
        (found,) = read(ring(radius)).things
        assert (found.thing.shape, found.thing.color, found.thing.size) == ("circle", "blue", size)


@pytest.mark.parametrize("shape", [(64, 50, 3), (224, 64, 3), (0, 32, 3), (64, 64), (64, 64, 4)])
def test_a_picture_that_is_no_canvas_is_refused(shape):
    with pytest.raises(ValueError):
        read(np.zeros(shape, np.uint8))


def test_integers_other_than_uint8_are_refused():
    with pytest.raises(ValueError):
        read(np.zeros((32, 32, 3), np.int64))


def test_exact_sees_every_attribute_and_no_detail():
    scene = lone()
    assert exact(lone(shade=0.75, stripes="vertical"), scene)
    others = [lone(shape="cross"), lone(color="blue"), lone(size="small"), lone(cell=(0, 1)), lone(background="white")]
    others += [replace(scene, things=()), replace(scene, rows=3)]
    assert not any(exact(other, scene) for other in others)


def test_attribute_scores_tell_what_is_wrong():
    scene = lone()
    perfect = dict.fromkeys(("shape", "color", "size", "position", "count", "background"), 1.0)
    assert attribute_scores(scene, scene) == perfect
    assert attribute_scores(read(render(scene)), scene) == perfect
    assert attribute_scores(lone(shape="cross"), scene) == {**perfect, "shape": 0.0}
    assert attribute_scores(lone(background="black"), scene) == {**perfect, "background": 0.0}
    missed = {**perfect, "shape": 0.0, "color": 0.0, "size": 0.0, "position": 0.0}
    assert attribute_scores(lone(cell=(1, 1)), scene) == missed
    extra = scene.with_things((*scene.things, *lone(cell=(1, 1)).things))
    assert attribute_scores(extra, scene) == {**perfect, "position": 0.5, "count": 0.0}
    empty = replace(scene, things=())
    assert attribute_scores(empty, empty) == perfect
    assert attribute_scores(empty, scene) == {**missed, "count": 0.0}


def test_detail_scores_respect_tolerance_and_symmetry():
    def scores(shape, true, got):
        return detail_scores(lone(shape, **got).things[0], lone(shape, **true).things[0])

    assert all(scores("heart", {}, {}).values())
    assert scores("heart", {"shade": 0.9}, {"shade": 0.83})["shade"]
    assert not scores("heart", {"shade": 0.9}, {"shade": 0.8})["shade"]
    assert scores("circle", {"rotation": -25.0}, {"rotation": 20.0})["rotation"]
    assert scores("star", {"rotation": -25.0}, {"rotation": 47.0})["rotation"]
    assert not scores("heart", {"rotation": -10.0}, {"rotation": 10.0})["rotation"]
    assert not scores("square", {"dy": 1.0}, {"dy": 0.2})["offset"]
    assert not scores("square", {"stripes": "vertical"}, {})["stripes"]
    assert not scores("square", {"mark": "upper-left"}, {"mark": "upper-right"})["mark"]
