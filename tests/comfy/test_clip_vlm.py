"""A CLIP of core as VLM: its states are core's and transformers', from one pass, and its weights are not copied."""

from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "scripts"
FAMILIES = ("qwen3vl", "qwen25vl", "gemma3", "gemma3 4b", "qwen3")
CASES = {
    "text": 0,
    "image": 3,
    "whole image": 1,
    "two images": 4,
    "batch": 1,
}  # pictures and thumbnails of the first row
NEW = 6


@pytest.fixture(scope="module")
def facts(run_in_comfy, tmp_path_factory):
    return run_in_comfy(SCRIPTS / "clip_vlm.py", str(tmp_path_factory.mktemp("clip")))


def cases(facts, family):
    return facts[family]["cases"].items()


@pytest.mark.parametrize("family", FAMILIES)
def test_text_states_are_those_of_cores_own_forward(facts, family):
    assert facts[family]["core"] == 0


def test_a_plain_prompt_of_krea_2_is_conditioned_as_by_core(facts):
    assert facts["krea2"] < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_equals_reading_it_all_again(facts, family):
    names = {name for name, _ in cases(facts, family)}
    assert names == {"qwen3": {"text"}, "gemma3 4b": {"text", "image"}}.get(family, set(CASES))
    for name, case in cases(facts, family):
        assert case["finite"] and case["gap"] <= 1e-5, name
        assert case["different tokens"] >= NEW - 1, "the same token over and over proves little"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_a_batch_is_what_it_is_alone(facts, family):
    for name, case in cases(facts, family):
        assert case["as alone"] <= 1e-6, name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_eyes_look_once_and_the_decoder_runs_once_per_token(facts, family):
    for name, case in cases(facts, family):
        rows = 2 if name == "batch" else 1
        assert case["calls"]["decoder"] == rows * (1 + NEW), name
        assert case["calls"].get("eyes", 0) == (CASES[name] > 0), name
        assert case["pictures"] == CASES[name] and case["every token named"], name


@pytest.mark.parametrize("family", ["qwen3vl", "qwen25vl", "gemma3"])
def test_transformers_with_the_same_weights_has_the_same_states_and_words(facts, family):
    against = facts[family]["transformers"]
    assert max(against["gaps"].values()) <= 1e-4 and set(against["gaps"]) == set(CASES)
    assert against["same words"] and against["same identity"]


def test_qwen25s_output_head_comes_from_the_clips_file(facts):
    assert "lm_head in qwen_2.5_vl.safetensors" in facts["head"]["notes"][-1]
    assert facts["head"]["transformers"]["same words"]
    assert "no lm_head" in facts["qwen25vl"]["notes"][-1]


@pytest.mark.parametrize("name", ["same decoder", "same patcher", "same parameters", "loaded again", "fp8"])
def test_the_weights_stay_the_clips(facts, name):
    assert facts["weights"][name] is True


def test_a_lora_on_the_clip_counts_and_leaves_with_it(facts):
    assert facts["weights"]["LoRA counts"] > 1e-2
    assert facts["weights"]["LoRA leaves"] == 0


def test_the_pass_has_one_dtype_which_can_be_chosen(facts):
    assert facts["weights"]["dtype of the pass"] == "torch.float32"
    assert facts["weights"]["half"] == "torch.bfloat16"
    assert facts["qwen3vl"]["notes"][0].endswith("computes in float32")


def test_the_empty_prompt_is_one_token(facts):
    assert facts["weights"]["empty"] == [1, 1]


def test_ltxs_gemma_is_found_inside_its_clip(facts):
    assert facts["weights"]["ltx"].startswith("gemma3-7x64-")


def test_a_text_encoder_that_was_cut_down_encodes_and_says_that_it_cannot_write(facts):
    assert facts["weights"]["cut down encodes"] == [2, 64]
    assert "cannot rewrite" in facts["weights"]["cut down"][-1]
    assert "set sampling to off" in facts["weights"]["cut down writes"]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("sd1", ["SD1ClipModel", "CLIPTextModel", "connect a CLIP of Qwen3-VL"]),
        ("text only", ["text-only"]),
        ("scheduled", ["schedule of hooks"]),
    ],
)
def test_what_cannot_serve_is_refused_with_the_cure(facts, case, words):
    for word in words:
        assert word in facts["refused"][case]


def test_cancelling_leaves_no_hook(facts):
    assert all(facts[family]["cancel leaves no hook"] for family in FAMILIES)


def test_rewrite_runs_on_it(facts):
    made = facts["nodes"]
    assert {case["width"] for case in made.values()} == {64}
    assert "rewrite" in made["text random"]["kinds"] and made["text random"]["text"]
    assert {"image", "rewrite"} <= set(made["image random"]["kinds"])
    assert "rewrite" not in made["image off"]["kinds"]
