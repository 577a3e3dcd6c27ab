import json
from collections import Counter
from dataclasses import replace
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from unifusion_core.conditioning.lap import LayerwiseAttentionPooling
from unifusion_core.conditioning.refiner import Refiner
from unifusion_core.conditioning.vlm import InternVL
from unifusion_core.diffusion.dit import DiT
from unifusion_core.diffusion.vae import VAE, VAESpec
from unifusion_core.evaluation import micro, reconstruction
from unifusion_core.evaluation.report import flatten, harmonic, nest, score, table, targets, wilson
from unifusion_core.microworld.caption import caption, parse_caption
from unifusion_core.microworld.edits import sample_composition, sample_edit
from unifusion_core.microworld.oracle import detail_scores
from unifusion_core.microworld.prompts import sample_prompt
from unifusion_core.microworld.render import render
from unifusion_core.microworld.scene import HELD_OUT_PAIRS, Detail, Scene, Thing, sample_scene
from unifusion_core.pipeline import UniFusion
from unifusion_core.presets import micro as micro_spec
from unifusion_core.training.micro_vlm import SYSTEM_PROMPT, build_model, build_tokenizer

torch.set_num_threads(1)

HEART = Thing(shape="heart", color="red", size="large", row=0, column=0, detail=Detail(mark="lower-left"))
STAR = Thing(shape="star", color="blue", size="small", row=1, column=1, detail=Detail(stripes="vertical"))
PAIR = Scene(background="gray", things=(HEART, STAR))
PROMPT_KINDS = ("full", "short", "indirect", "count", "relation")


def edits(count=21):
    rng = Random(5)
    return [sample_edit(rng, micro.OPERATIONS[i % 7]) for i in range(count)]


# Scores.


def test_wilson_agrees_with_known_values():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=2e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=2e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=2e-4)


def test_a_score_says_mean_interval_and_number():
    assert score([True, False]) == {"mean": 0.5, "interval": list(wilson(1, 2)), "n": 2}
    assert score([30.0, 32.0])["interval"] == pytest.approx([31 - 1.96, 31 + 1.96])
    assert score([0.9, 1.0, 1.0])["interval"][1] == 1.0
    assert score([]) == {"mean": None, "interval": None, "n": 0}


def test_the_harmonic_mean_needs_both():
    both = harmonic(score([1, 1, 0, 0]), score([1, 1, 1, 1]))
    assert both["mean"] == pytest.approx(2 / 3) and both["interval"][0] < both["mean"] < both["interval"][1]
    assert harmonic(score([1]), score([]))["mean"] == 0


def test_flatten_keeps_every_leaf_under_its_dotted_name():
    report = {**nest({("edit", "success"): [1, 1], ("edit", "success_by", "move"): [1]}), "meta": {"seeds": [0, 1]}}
    assert list(flatten(report)) == ["edit.success", "edit.success_by.move", "meta.seeds"]


def test_the_table_says_which_targets_are_met():
    report = nest({("edit", "success"): [1.0] * 9 + [0.0], ("edit", "preserved"): [0.5, 0.6], ("edit", "found"): []})
    report["tiles"] = nest({("1", "psnr"): [20.0, 22.0], ("9", "psnr"): [29.0, 31.0], ("9", "marks"): [0.0]})
    assert targets(report) == {"edit.success": 0.8, "edit.preserved": 0.9, "tiles.9.psnr": 28.0, "tiles.9.marks": 0.8}
    assert targets({"reconstruction": {"tiles": report["tiles"]}}).keys() == {
        "reconstruction.tiles.9.psnr",
        "reconstruction.tiles.9.marks",
    }
    lines = {line.split()[0]: line for line in table({**report, "meta": {"num": 10}}).splitlines() if line.strip()}
    assert lines["edit.success"].endswith(">= 0.8  met") and lines["edit.preserved"].endswith(">= 0.9  missed")
    assert lines["tiles.9.psnr"].endswith("met") and lines["tiles.1.psnr"].endswith("2")
    assert "-" in lines["edit.found"] and lines["meta.num"].endswith("10")
    assert lines["edit.success"].index("0.900") == lines["edit.preserved"].index("0.550")


# Pictures.


def test_true_pictures_of_scenes_score_one():
    scenes = [sample_scene(Random(seed), held_out=None) for seed in range(12)]
    values = micro.score_scenes([render(scene) for scene in scenes], scenes)
    assert set(values) == {"exact", "shape", "color", "size", "position", "count", "background"}
    assert all(numbers == [1.0] * 12 for numbers in values.values())


def test_one_wrong_attribute_lowers_its_own_score_and_exact():
    wrong = {
        "color": PAIR.with_things((replace(HEART, color="yellow"), STAR)),
        "shape": PAIR.with_things((replace(HEART, shape="square"), STAR)),
        "size": PAIR.with_things((replace(HEART, size="small"), STAR)),
        "background": replace(PAIR, background="white"),
    }
    for name, scene in wrong.items():
        values = micro.score_scenes([render(scene)], [PAIR])
        lowered = {key for key, numbers in values.items() if numbers != [1.0]}
        assert lowered == {"exact", name}
    values = micro.score_scenes([render(PAIR.with_things((HEART,)))], [PAIR])
    assert values["count"] == [0.0] and values["position"] == [0.5] and values["exact"] == [0.0]


def test_a_prompt_is_scored_by_its_constraints():
    cases = [sample_prompt(Random(seed), kind) for kind in PROMPT_KINDS for seed in range(4)]
    assert all(micro.score_prompts([render(case.scene) for case in cases], cases))
    empty = Scene(background="gray", things=())
    assert not any(micro.score_prompts([render(empty)] * len(cases), cases))


def test_true_targets_of_edits_score_one_and_unchanged_sources_fail_but_preserve():
    cases = edits()
    perfect = micro.score_edits([render(edit.target) for edit in cases], cases)
    assert all(perfect.success) and all(perfect.found) and set(perfect.preserved) == {1.0}
    assert all(all(numbers) for numbers in perfect.details.values())
    assert set(perfect.details) == set(detail_scores(HEART, HEART))
    source = micro.score_edits([render(edit.source) for edit in cases], cases)
    assert not any(source.success) and set(source.preserved) == {1.0}
    assert len(source.found) == sum(len(edit.untouched) for edit in cases)


def test_a_lost_detail_lowers_preservation_and_not_success():
    case = next(edit for edit in edits() if len(edit.untouched) == 1)
    kept = case.untouched[0]
    other = "none" if kept.detail.mark != "none" else "upper-left"
    changed = replace(kept, detail=replace(kept.detail, mark=other))
    things = [changed if thing == kept else thing for thing in case.target.things]
    scores = micro.score_edits([render(case.target.with_things(things))], [case])
    assert scores.success == [True] and scores.preserved == pytest.approx([0.8])
    assert scores.details["mark"] == [False] and scores.details["stripes"] == [True]


def test_a_missing_thing_is_not_found_and_has_no_detail():
    case = next(edit for edit in edits() if len(edit.untouched) == 1)
    rest = [thing for thing in case.target.things if thing != case.untouched[0]]
    scores = micro.score_edits([render(case.target.with_things(rest))], [case])
    assert scores.success == [False] and scores.found == [False] and scores.preserved == [] and not scores.details


def test_compositions_keep_the_details_of_both_things():
    cases = [sample_composition(Random(seed)) for seed in range(8)]
    perfect = micro.score_compositions([render(case.target) for case in cases], cases)
    assert all(perfect.success) and set(perfect.preserved) == {1.0} and len(perfect.found) == 16
    plain = [parse_caption(caption(case.target)) for case in cases]
    words_alone = micro.score_compositions([render(scene) for scene in plain], cases)
    assert all(words_alone.success) and np.mean(words_alone.preserved) < 0.7


def test_first_and_last_mentioned_things_are_told_apart():
    wrong_last = PAIR.with_things((HEART, replace(STAR, color="green")))
    assert micro.score_order([render(wrong_last)], [PAIR]) == {"first": [True], "last": [False]}
    case = sample_prompt(Random(0), "indirect", late=True)
    assert micro.score_late_prompts([render(case.scene)], [case]) == {"exact": [True], "first": [True], "last": [True]}


def test_texts_are_scored_by_what_they_name():
    assert micro.score_texts(
        [caption(PAIR), "a red heart", caption(PAIR)], [PAIR, PAIR, Scene(background="gray", things=())]
    ) == [
        True,
        False,
        False,
    ]


def test_psnr_and_ssim_of_known_pictures():
    image = np.full((32, 32, 3), 100, np.uint8)
    assert reconstruction.psnr(image, image) == reconstruction.PSNR_LIMIT
    assert reconstruction.psnr(image, image + 10) == pytest.approx(28.13, abs=0.01)
    assert reconstruction.ssim(image, image) == pytest.approx(1.0)
    # without variance only the luminance term is left
    c1 = (0.01 * 255) ** 2
    assert reconstruction.ssim(image, image + 50) == pytest.approx((2 * 100 * 150 + c1) / (100**2 + 150**2 + c1))
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    assert reconstruction.ssim(noise, image) < 0.1
    assert reconstruction.ssim(noise, image) == pytest.approx(reconstruction.ssim(image, noise))


def test_a_mark_that_is_lost_or_whose_thing_is_lost_is_wrong():
    scene = Scene(background="gray", things=(HEART, STAR), rows=4, columns=4)
    unmarked = scene.with_things((replace(HEART, detail=Detail()), STAR))
    images = [render(scene), render(unmarked), render(scene.with_things((STAR,)))]
    values = reconstruction.score_pictures(images, [render(scene)] * 3, [scene] * 3)
    assert values["marks"] == [True, True, False, True, False, True] and values["exact"] == [True, True, False]
    assert values["psnr"][0] > values["psnr"][1] > values["psnr"][2]


# Whole runs.


class Painter:
    """Stands in for a model: knows each request's answer, and paints it, or what it is told to paint instead."""

    device = torch.device("cpu")
    spec = replace(micro_spec(), name="painter")

    def __init__(self, answers, wrong=None):
        self.answers, self.wrong = answers, wrong
        self.vae = SimpleNamespace(encode=lambda pixels: pixels)
        self.noises = []

    def prepare(self, requests, *, rewriting=True, **settings):
        scenes = [self.wrong or self.answers[key(r.prompt, r.images)] for r in requests]
        return SimpleNamespace(texts=tuple(map(caption, scenes)), scenes=scenes, requests=requests)

    def replay(self, requests, texts):
        scenes = [self.wrong or self.answers.get(key(r.prompt, r.images)) for r in requests]
        scenes = [scene or parse_caption(text) for scene, text in zip(scenes, texts, strict=True)]
        return SimpleNamespace(texts=tuple(texts), scenes=scenes, requests=requests)

    def sample(self, conditions, *, schedule=None, seed=0):
        self.noises += range(seed, seed + len(conditions.scenes))
        if schedule == "text:0-1":
            return [parse_caption(caption(scene)) for scene in conditions.scenes]
        if schedule == "image:0-1":
            return [request.images[0] for request in conditions.requests]
        return conditions.scenes

    def decode(self, latents):
        if isinstance(latents, torch.Tensor):
            return [Image.fromarray(x) for x in latents.mul(255).round().byte().permute(0, 2, 3, 1).numpy()]
        return [x if isinstance(x, Image.Image) else render(x) for x in latents]


def key(prompt, images=()):
    return prompt, tuple(image.tobytes() for image in images)


@pytest.fixture
def answers(monkeypatch):
    """Request → scene, gathered while `evaluate` draws its cases."""
    known = {}

    def recording(name, keys):
        sampler = getattr(micro, name)

        def record(*args, **kwargs):
            case = sampler(*args, **kwargs)
            known.update(keys(case))
            return case

        monkeypatch.setattr(micro, name, record)

    recording("sample_prompt", lambda case: {key(case.text): case.scene})
    recording("sample_edit", lambda case: {key(case.instruction, [render(case.source)]): case.target})
    recording(
        "sample_composition", lambda case: {key(case.instruction, list(map(render, case.references))): case.target}
    )
    recording(
        "sample_scene",
        lambda scene: {
            key(text, [render(scene)]): scene for group in micro.CAPTION_PATTERNS.values() for text in group
        },
    )
    return known


def test_a_perfect_model_scores_one_everywhere_but_in_its_controls(answers):
    loaded, seen = [], []

    def load(name):
        loaded.append(name)
        return Painter(answers)

    report = micro.evaluate(load, num=7, seeds=(0, 1), batch_size=3, progress=lambda *state: seen.append(state))
    assert loaded == ["micro", "micro-base"]
    leaves = flatten(report)
    below = {name for name, leaf in leaves.items() if isinstance(leaf, dict) and leaf["mean"] != 1}
    assert below == {
        "edit.controls.unchanged_source.success",
        "edit.controls.text_only.preserved",
        "multi_reference.controls.text_only.preserved",
        "zero_shot_edit.share.0.preserved",
        "zero_shot_edit.share.0.harmonic",
        "zero_shot_edit.share.1.success",
        "zero_shot_edit.share.1.harmonic",
    }
    assert leaves["edit.controls.unchanged_source.success"]["mean"] == 0
    assert leaves["zero_shot_edit.best_share"] == 0.1 and leaves["zero_shot_edit.window_beats_both_ends"]
    assert {name: leaf["n"] for name, leaf in leaves.items() if name.startswith("rewrite.")} == {
        **{f"rewrite.{kind}": 14 for kind in (*PROMPT_KINDS, "late", "caption", "edit")},
        "rewrite.compose": 6,
        "rewrite.exact": 118,
    }
    expected = {
        "text_to_image.exact": 14,
        "verifi.indirect.exact": 14,
        "verifi.full.exact": 6,
        "verifi.off.full.exact": 2,
        "edit.success": 14,
    }
    assert {name: leaves[name]["n"] for name in expected} == expected
    assert {name.split(".")[2] for name in leaves if name.startswith("edit.success_by")} == set(micro.OPERATIONS)
    last = {part: (done, total) for part, done, total in seen}
    assert all(done == total for done, total in last.values()) and last.keys() == report["meta"]["seconds"].keys()
    assert targets(report).keys() >= {"rewrite.exact", "verifi.indirect.exact", "edit.preserved"}
    assert "missed" not in table(json.loads(json.dumps(report)))


def test_a_model_that_always_paints_the_same_scores_nothing(answers):
    odd = Scene(
        background="beige", things=tuple(replace(HEART, color="cyan", row=r, column=c) for r in (0, 1) for c in (0, 1))
    )
    report = micro.evaluate(lambda _: Painter(answers, wrong=odd), num=3, seeds=(0,), batch_size=2)
    leaves = flatten(report)
    for name in ("text_to_image.exact", "rewrite.exact", "edit.success", "multi_reference.success"):
        assert leaves[name]["mean"] == 0
    for kind in ("full", "indirect"):
        assert leaves[f"verifi.{kind}.exact"]["mean"] == 0


def test_cases_and_noises_do_not_depend_on_the_batch_size(answers):
    runs = []
    for batch_size in (2, 5):
        painter = Painter(answers)
        values = micro.defaultdict(list)
        micro.edits(values, painter, micro.Run(seeds=(0, 3), batch_size=batch_size), 5, controls=5)
        runs.append((dict(values), Counter(painter.noises)))
    assert runs[0] == runs[1] and len(set(runs[0][1])) == 10


def test_fewer_cases_are_the_first_of_more():
    run = micro.Run(seeds=(0,))
    few, many = (next(run.batches("edit", micro._make_edit(run), num))[0] for num in (3, 6))
    assert few == many[:3]


def test_held_out_cases_are_held_out_and_train_cases_are_not():
    for split, share in (("heldout", 0.5), ("train", 0.0)):
        run = micro.Run(split=split, seeds=(0,))
        scenes = next(run.batches("x", lambda rng, _, odd: sample_scene(rng, held_out=odd), 20))[0]
        odd = [any(thing.pair in HELD_OUT_PAIRS for thing in scene.things) for scene in scenes]
        assert np.mean(odd) == share


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"split": "test"}, "'test'"), ({"num": 0}, "num 0"), ({"seeds": ()}, "seeds"), ({"batch_size": 0}, "0")],
)
def test_settings_that_cannot_be_used_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        micro.evaluate(lambda name: None, **settings)
    with pytest.raises(ValueError, match="tiles 3"):
        reconstruction.evaluate(lambda name: None, tiles=(1, 3))


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    spec = replace(micro_spec(), steps=2)
    vlm = InternVL(
        build_model(tokenizer),
        tokenizer,
        layers=spec.layers,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        system_prompt=SYSTEM_PROMPT,
    )
    parts = LayerwiseAttentionPooling(spec.lap), Refiner(spec.refiner), DiT(spec.dit)
    return UniFusion(replace(spec, vlm=vlm.identity), vlm, *parts, VAE(VAESpec()))


def test_an_untrained_model_runs_through_and_meets_no_target(untrained, monkeypatch):
    monkeypatch.setattr(micro, "MAX_NEW_TOKENS", 3)
    report = micro.evaluate(lambda _: untrained, num=2, seeds=(0,), batch_size=2)
    leaves = flatten(json.loads(json.dumps(report)))
    assert (
        leaves["text_to_image.exact"]["mean"] == leaves["rewrite.exact"]["mean"] == leaves["edit.success"]["mean"] == 0
    )
    assert leaves["controls.oracle_on_renders.exact"]["mean"] == 1
    assert leaves["edit.controls.unchanged_source.preserved"]["mean"] in (None, 1)
    assert report["meta"]["micro"]["steps"] == 2
    assert table(report).count("missed") >= 3


def test_reconstruction_runs_through_on_an_untrained_model(untrained):
    seen = []
    report = reconstruction.evaluate(
        lambda _: untrained, tiles=(1, 4), num=2, progress=lambda *state: seen.append(state)
    )
    leaves = flatten(json.loads(json.dumps(report)))
    things = leaves["tiles.4.marks"]["n"]
    for name in ("tiles.1", "tiles.4", "tiles.4.guided", "micro-base.tiles.4", "controls.vae_round_trip"):
        assert leaves[f"{name}.psnr"]["n"] == leaves[f"{name}.exact"]["n"] == 2
        assert leaves[f"{name}.marks"]["n"] == things and leaves[f"{name}.ssim"]["mean"] < 0.9
    assert leaves["controls.oracle_on_renders.marks"]["mean"] == leaves["controls.oracle_on_renders.exact"]["mean"] == 1
    assert 0.2 <= leaves["controls.marks_chance"]["mean"] < 1
    assert set(targets(report)) == {"tiles.4.psnr", "tiles.4.marks"} and len(seen) == 4


def test_image_tokens_do_not_depend_on_the_words_behind_them(untrained):
    images = [render(sample_scene(Random(1), rows=4, columns=4, count=5))]
    first = reconstruction.reconstruct(untrained, images, 2)
    original, reconstruction.PROMPT = reconstruction.PROMPT, "a red star"
    try:
        second = reconstruction.reconstruct(untrained, images, 2)
    finally:
        reconstruction.PROMPT = original
    for one, other in zip(first, second, strict=True):
        assert np.abs(np.asarray(one[0]).astype(int) - np.asarray(other[0]).astype(int)).max() <= 1
