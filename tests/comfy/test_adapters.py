"""LAP adapters in ComfyUI: untrained they change nothing, trained they are core's, and wrong wires are named."""

from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "scripts"
PROFILES = ["boogu", "ideogram4", "klein-4b", "z-image"]
WORDS = {
    "another profile": ["trained for FLUX.2 Klein 4B", "profile is z-image", "set profile to klein-4b here and at"],
    "not tapped": ["lack [2, 5, 8,", "connect vlm of UniFusion Load Adapter to UniFusion Rewrite"],
    "states of another VLM": ["the VLM is qwen3-36x32-1", "connect that VLM to vlm of UniFusion Load Adapter"],
    "no VLM for its norm": ["behind the VLM's final norm: connect vlm"],
    "another VLM for its norm": ["connect the VLM that made it"],
    "loaded with another VLM": ["trained on the states of qwen3-36x32-1", "connect that VLM"],
    "loaded with a narrower VLM": ["reads states of width 64", "have 32", "connect Qwen3-4B to vlm"],
    "loaded with the embedded VLM": ["the VLM is internvl", "connect that VLM"],
    "a VLM as adapter": ["adapter is ManagedClipVLM; connect UniFusion Load Adapter"],
    "no such file": ["adapter is 'none.safetensors'"],
}


@pytest.fixture(scope="module")
def facts(run_in_comfy):
    return run_in_comfy(SCRIPTS / "adapters.py")


@pytest.mark.parametrize("name", PROFILES)
def test_untrained_it_changes_not_a_bit(facts, name):
    found = facts[name]
    assert found["host's size"] > 0.05
    assert found["untrained"] and found["words"] and found["without the adapter"]


@pytest.mark.parametrize("name", PROFILES)
def test_trained_it_gives_what_core_gives(facts, name):
    found = facts[name]
    assert found["trained differs"] > 1e-3
    assert found["as core"]
    assert found["rewrite as core"] and found["rewrite is the last span"] == "rewrite"


@pytest.mark.parametrize("name", PROFILES)
def test_rewrite_taps_the_layers_of_both(facts, name):
    plain, tapped, of_adapter = facts[name]["layers"]
    assert set(plain) < set(tapped) and tapped == of_adapter
    assert facts[name]["own layers"] == sorted({*facts[name]["its own taps stay"], *of_adapter})


@pytest.mark.parametrize("name", PROFILES)
def test_the_weights_are_the_vlms_and_the_node_says_so(facts, name):
    assert facts[name]["no second VLM"]
    assert f"LAP adapter over {len(facts[name]['layers'][1])} layers" in facts[name]["shown"]


def test_only_adapters_are_listed_and_opened(facts):
    names = [f"lap-{name}-{kind}.safetensors" for name in PROFILES for kind in ("trained", "untrained")]
    assert facts["listed"]["adapters"] == sorted(["lap-big.safetensors.index.json", *names])
    assert facts["listed"]["models"] == []
    assert len(facts["listed"]["refused"]) == 4
    assert all("is not on this server" in message for message in facts["listed"]["refused"].values())


@pytest.mark.parametrize("case", WORDS)
def test_a_wrong_wire_is_named(facts, case):
    for words in WORDS[case]:
        assert words in facts["refused"][case]


def test_a_vlm_from_a_file_and_its_adapter_are_kept_once_and_freed(facts):
    found = facts["from a file"]
    for name in ("untrained", "one adapter", "one VLM", "the same afterwards"):
        assert found[name] is True, name
    assert found["told to forget once"] == 1
    assert found["loaded"] == found["loaded again"] == [True, True]
    assert found["after unload models"] == [False, False]
    assert found["the VLM is shared by whoever loads it next"]
    assert found["gone when no graph holds them"] == [True, True]


def test_saved_workflows_still_fit(facts):
    """The new input came last, and none need connect it."""
    assert facts["inputs"] == [
        ["hidden", False], ["profile", False], ["tokens", False], ["vlm", True], ["adapter", True],
    ]  # fmt: skip
