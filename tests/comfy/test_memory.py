"""The VLM is loaded once, leaves when it is asked to, and comes back the same."""

from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "scripts"


@pytest.fixture(scope="module")
def facts(run_in_comfy):
    return run_in_comfy(SCRIPTS / "memory.py")


@pytest.mark.parametrize(
    "name",
    ["two loaders share one", "dropout shares the weights", "known by its patcher", "gone when no graph holds it"],
)
def test_holds(facts, name):
    assert facts[name] is True


def test_unload_models_frees_both(facts):
    assert facts["loaded"] == facts["loaded again"] == [True, True]
    assert facts["after unload models"] == [False, False]


def test_the_states_are_the_same_afterwards(facts):
    assert facts["the same afterwards"] == 0


def test_another_schedule_refines_nothing_again(facts):
    assert facts["refiner runs for three schedules"] == 2
