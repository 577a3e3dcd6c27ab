"""Schedules in a real ComfyUI: exact in steps with every sampler, one forward a step where one track speaks."""

import math
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "scripts"


@pytest.fixture(scope="module")
def samplers(run_in_comfy):
    return run_in_comfy(SCRIPTS / "samplers.py", 4)


@pytest.fixture(scope="module")
def facts(run_in_comfy):
    return run_in_comfy(SCRIPTS / "schedules.py")


def test_every_sampler_and_scheduler_gives_finite_latents(samplers):
    assert samplers["runs"] == 4 * samplers["samplers"] >= 160
    assert samplers["broken"] == []


def test_every_evaluation_belongs_to_its_step(samplers):
    assert samplers["wrong"] == []


@pytest.mark.parametrize(
    "name",
    ["equals core's ranges", "equals its export", "equals two connected tracks", "KSamplerAdvanced over all steps"]
    + ["a fade of equal tokens is that token", "a wrapped foreign model follows"],
)
def test_the_same_schedule_in_another_way_is_the_same_picture(facts, name):
    assert facts[name] == 0


def test_combining_one_schedule_twice_loses_neither(facts):
    assert facts["two masked halves of one schedule"] < 1e-4


def test_a_schedule_does_something(facts):
    assert facts["differs from text alone"] > 0.1
    assert facts["an unwrapped one does not"] > 0.1


@pytest.mark.parametrize("name", ["switch", "fade", "fade by heun", "sigma"])
def test_schedules_equal_the_core_packages(facts, name):
    assert facts[f"core: {name}"] < 1e-4


def test_pure_steps_take_one_forward_and_fades_two(facts):
    assert facts["forwards"] == {"pure": 4, "fade": 6, "part": 4, "fade of tokens": 4}


def test_a_share_is_exactly_its_rounded_number_of_steps(facts):
    for name, (image, total, together) in facts["steps of image"].items():
        steps = int(name.split()[-1])
        assert (image, total, together) == (math.floor(0.15 * steps + 0.5 + 1e-9), steps, 1), name


def test_a_part_of_the_steps_is_scheduled_by_its_own_length(facts):
    assert facts["advanced"] == [2, 10, 1]  # 0.15 of the ten steps that run


def test_another_model_follows_too(run_in_comfy):
    """Core's Krea 2, whose conditioning knows nothing of ours."""
    facts = run_in_comfy(SCRIPTS / "foreign.py")
    assert facts["class"] == "Krea2" and facts["finite"]
    assert facts["core's ranges"] == facts["its export without a wrapper"] == 0
    assert facts["b alone"] > 1e-3
