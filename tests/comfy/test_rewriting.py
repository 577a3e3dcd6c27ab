"""The Rewrite node gives records that it can replay, and forgets pictures when its VLM leaves the device."""

from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "scripts"


@pytest.fixture(scope="module")
def facts(run_in_comfy):
    return run_in_comfy(SCRIPTS / "rewriting.py")


@pytest.mark.parametrize(
    "name", ["record", "replayed", "an edited text has no record", "off has no record", "within the budget"]
)
def test_holds(facts, name):
    assert facts[name] is True


def test_a_record_replays_exactly(facts):
    assert facts["replayed states"] < 1e-3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("another prompt", "record 0 is of another request: prompt is 'paint it red', not 'paint the heart green'"),
        ("another picture", "images is"),
        ("a damaged record", "the record of a rewrite has token_ids"),
        ("left out", 'left out "ZQX" of the prompt'),
        ("impossible budget", "token_budget 1"),
        ("empty prompt", "the prompt is empty"),
        ("another model's profile", "Krea 2 is conditioned on Qwen3-VL-4B, but this VLM is internvl-"),
        ("a number for a switch", "protect_quotes is 2; true or false is accepted"),
    ],
)
def test_refuses(facts, name, message):
    assert message in facts[name]


def test_pictures_are_read_once_for_two_instructions_and_forgotten_when_the_vlm_leaves(facts):
    assert facts["pictures are looked at"] == 1
    assert facts["remembered"] == 1 and facts["remembered after unloading"] == 0


def test_every_mode_keeps_its_tokens(facts):
    spans, tokens = facts["spans"], facts["tokens"]
    pictures = spans["image"] + spans.get("thumbnail", 0)
    turn = pictures + spans["instruction"] + spans["marker"]
    assert tokens["rewrite"] == tokens["think + rewrite"] == spans["rewrite"]
    assert tokens["image + rewrite"] == pictures + spans["rewrite"]
    assert tokens["user turn"] == turn and tokens["all"] == turn + spans["rewrite"]
    assert tokens["everything"] == sum(spans.values())
