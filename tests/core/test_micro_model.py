"""Facts about the embedded model: it is small, trained, and the same for everyone."""

from random import Random

import numpy as np
import pytest
import torch

from unifusion_core.conditioning.vlm import Request
from unifusion_core.microworld.caption import caption, parse_caption
from unifusion_core.microworld.oracle import exact, read
from unifusion_core.microworld.prompts import sample_prompt
from unifusion_core.microworld.render import render
from unifusion_core.microworld.scene import sample_scene
from unifusion_core.pipeline import WEIGHTS, load_model


@pytest.fixture(scope="module")
def model():
    return load_model("micro")


def scenes(num):
    rng = Random("micro model")
    return [sample_scene(rng) for _ in range(num)]


def draw(model, texts, **sampling):
    return model.decode(model.sample(model.replay([Request(text) for text in texts], texts), **sampling))


def test_all_embedded_files_together_are_small():
    size = sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file())
    assert size <= 40e6


def test_both_stages_stand_on_one_vlm(model):
    base = load_model("micro-base")
    assert base.spec.vlm == model.spec.vlm == model.vlm.identity
    assert not torch.equal(base.dit.final_layer.linear.weight, model.dit.final_layer.linear.weight)


def test_it_draws_what_a_caption_names(model):
    wanted = scenes(12)
    pictures = draw(model, [caption(scene) for scene in wanted])
    assert sum(exact(read(picture), scene) for picture, scene in zip(pictures, wanted, strict=True)) >= 8


def test_it_draws_a_picture_again_from_image_tokens_alone(model):
    truths = [render(scene) for scene in scenes(6)]
    conditions = model.conditions(model.vlm.encode([Request("", (truth,)) for truth in truths]))
    pictures = model.decode(model.sample(conditions, schedule="image:0-1"))
    errors = [
        np.square(np.asarray(a, float) - np.asarray(b, float)).mean() for a, b in zip(truths, pictures, strict=True)
    ]
    assert 10 * np.log10(255**2 / np.mean(errors)) > 22


def test_verifi_works_prompts_out(model):
    rng = Random(3)
    prompts = [sample_prompt(rng, kind) for kind in ("full", "count", "relation") for _ in range(4)]
    texts = model.rewrite([Request(prompt.text) for prompt in prompts]).texts
    assert sum(p.constraints.accepts(parse_caption(text)) for p, text in zip(prompts, texts, strict=True)) >= 9


def test_a_picture_in_a_batch_is_the_picture_alone(model):
    texts = [caption(scene) for scene in scenes(3)]
    alone = model.sample(model.replay([Request(texts[1])], [texts[1]]), seed=8, steps=4)
    batch = model.sample(model.replay([Request(text) for text in texts], texts), seed=7, steps=4)
    assert torch.allclose(alone[0], batch[1], atol=2e-4)


def test_other_canvases_than_the_default(model):
    text = "one shape on a white background : a large red circle at top-center"
    assert draw(model, [text], size=(96, 64), steps=2)[0].size == (96, 64)
