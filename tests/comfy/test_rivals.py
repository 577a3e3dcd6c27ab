"""Models with LAP's rivals in a real ComfyUI: the same latents as in unifusion_core, and messages that are right."""

from pathlib import Path

import pytest
import torch

from unifusion_core.training import micro_t5

SCRIPT = Path(__file__).parent / "scripts" / "rivals.py"
RIVALS = ("last", "penultimate", "keys", "keys, refined", "injection", "lap-per-block")
PLACES = ("refiner before", "refiner none", "every layer")


@pytest.fixture(scope="module")
def facts(run_in_comfy, tmp_path_factory):
    t5 = tmp_path_factory.mktemp("t5") / "tiny-t5"
    torch.manual_seed(0)
    micro_t5.save(micro_t5.build_model(micro_t5.build_tokenizer()), t5)
    return run_in_comfy(SCRIPT, str(t5))


@pytest.mark.parametrize("name", [*RIVALS, *PLACES])
def test_latents_are_cores(facts, name):
    found = facts[name]
    same = ("UniFusionSampler", "KSampler", "switch", "concatenated", "two prompts in one batch", "off")
    same += ("with their negative",)
    assert {way: found[way] for way in same if not found[way] < 1e-4} == {}
    assert found["rows"] == [4] * 4
    assert found["one prompt, batch 2"] < 1e-4 and found["picture"] < 0.01
    assert found["size"] > 0.1 and found["unlike another prompt"] > 1e-2


@pytest.mark.parametrize("name", [*RIVALS, *PLACES])
def test_the_tracks_and_the_negative_differ_in_length(facts, name):
    assert len(set(facts[name]["lengths"])) == 3 and min(facts[name]["lengths"]) == 1


@pytest.mark.parametrize("name", [name for name in (*RIVALS, *PLACES) if name != "refiner before"])
def test_parts_of_one_conditioning_are_those_selected(facts, name):
    assert facts[name]["switch of its own parts"] < 1e-5


def test_their_layers_are_the_papers(facts):
    assert (facts["last"]["layers"], facts["penultimate"]["layers"]) == ([11], [10])
    assert facts["every layer"]["layers"] == list(range(1, 12))


def test_one_rewrite_serves_models_of_fewer_layers(facts):
    assert max(facts["side by side"].values()) < 1e-5


def test_a_t5_conditions_through_the_same_nodes(facts):
    found = facts["t5"]
    assert found["UniFusionSampler"] < 1e-4 and found["KSampler"] < 1e-4
    assert found["lengths"][0] == 1 < found["lengths"][1]
    assert "sampling off" in found["writing"] and "sampling off" in found["text"]
    assert "T5 reads text alone" in found["picture"]


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("parts of mixed tokens", "'image' is part of tokens that this model's refiner has mixed before LAP"),
        ("layers that were not tapped", "hidden lacks layer 10 of the VLM (it holds 2, 5, 8, 11): connect fusion"),
        ("another model's width", "it is for another model; this one takes layers 2, 5, 8, 11, as keys and values"),
        ("another VLM's fusion", "trained on the VLM another-vlm, but vlm is internvl-"),
        ("another VLM's fusion", "load the VLM that belongs to the model, or leave fusion out"),
        ("one layer, weights", "'layer weights' is of LAP, but this model reads layer 10 alone"),
        ("one layer, similarity", "only one layer is tapped"),
        ("keys, norms", "this model reads layers 2, 5, 8, 11, as keys and values of every block, no refiner"),
        ("a LAP per block, dropout", "this model reads a LAP for every block over layers 2, 5, 8, 11, added behind"),
        ("one layer, dropped", "reads layer 10 alone, refiner after: there is none to leave out"),
    ],
)
def test_messages_speak_of_what_the_model_has(facts, what, says):
    assert says in facts["refused"][what]


def test_an_empty_conditioning_cannot_leave_fusion_out(facts):
    assert facts["refused"]["another VLM's empty prompt"].endswith("load the VLM that belongs to the model")


@pytest.mark.parametrize(
    "what", ["keys, similarity", "every layer, weights", "one layer, none dropped", "keys, one dropped"]
)
def test_what_can_be_shown_is_shown(facts, what):
    assert facts["refused"][what] == ""
