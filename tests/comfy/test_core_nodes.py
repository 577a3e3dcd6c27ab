"""Core's nodes work on our MODEL, VAE and CONDITIONING as on core's own."""

import shutil
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "scripts"


@pytest.fixture(scope="module")
def facts(run_in_comfy):
    return run_in_comfy(SCRIPTS / "core_nodes.py")


@pytest.mark.parametrize(
    "name",
    [
        "SamplerCustomAdvanced, CFGGuider",
        "SamplerCustomAdvanced, BasicGuider",
        "VAEDecode",
        "VAEEncode",
        "round trip",
        "merging with itself",
        "the model is left alone",
    ],
)
def test_equal_to_the_bit(facts, name):
    assert facts[name] == 0


@pytest.mark.parametrize(
    "name",
    [
        "inpainting keeps the left half",
        "Concat equals ours",
        "Concat keeps the picture's places",
        "Average at 1",
        "Combine equals prediction halves",
        "a mask of ones",
        "a range of all",
        "average of one with itself",
        "padding does not speak",
        "a batch equals one",
        "LoRA names differ by",
        "core's LoRA loader",
        "ModelSamplingSD3 at shift 1",
        "ModelSamplingAuraFlow at shift 1",
    ],
)
def test_equal_but_for_rounding(facts, name):
    assert facts[name] < 1e-4


@pytest.mark.parametrize("name", ["inpainting changes the right half", "a LoRA changes the picture", "half a merge"])
def test_changes_the_picture(facts, name):
    assert facts[name] > 0.01


@pytest.mark.parametrize(
    "name",
    ["VAEDecodeTiled, shape", "img2img keeps more at low denoise", "Average is finite", "ZeroOut is finite"],
)
def test_holds(facts, name):
    assert facts[name] is True


def test_zeroed_tokens_are_no_tokens(facts):
    assert facts["ZeroOut leaves no token"] is False


def test_tiled_decoding_is_close(facts):
    assert facts["VAEDecodeTiled, mean"] < 0.02


def test_a_merge_survives_saving(facts):
    assert facts["saved and loaded"] < 1e-3  # core saves in half precision
    assert facts["its fusion is blocked"] == "ExecutionBlocker"


def test_states_of_another_vlm_are_refused(facts):
    assert "come from qwen; load the VLM that belongs to the model" in facts["another VLM's states"]


def test_a_lora_of_another_model_is_refused(facts):
    assert "none of its 2 tensors fits" in facts["a LoRA that fits nothing"]


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler: TorchCompileModel is not tested")
def test_a_compiled_model_makes_the_same_picture(run_in_comfy):
    assert run_in_comfy(SCRIPTS / "compiled.py")["differs"] < 1e-4
