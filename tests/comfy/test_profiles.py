"""Encoder profiles beside core's own text encoders and DiTs, small and random."""

from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "scripts"
PLAIN = ["krea2", "boogu", "qwen-image", "ideogram4", "klein-4b", "klein-9b", "z-image"]
EDIT = ["boogu-edit", "qwen-image-edit", "qwen-image-edit-2509"]
CLASSES = {
    "krea2": "Krea2",
    "boogu": "Boogu",
    "boogu-edit": "Boogu",
    "qwen-image": "QwenImage",
    "qwen-image-edit": "QwenImage",
    "qwen-image-edit-2509": "QwenImage",
    "ideogram4": "Ideogram4",
    "klein-4b": "Flux2",
    "klein-9b": "Flux2",
    "z-image": "Lumina2",  # core's class of Z-Image
}


@pytest.fixture(scope="module")
def facts(run_in_comfy):
    return run_in_comfy(SCRIPTS / "profiles.py")


@pytest.mark.parametrize("name", CLASSES)
def test_a_plain_prompt_is_encoded_as_by_core(facts, name):
    found = facts[name]
    assert found["size"] > 0.1 and found["difference"] <= 1e-5
    assert found["shape"][0] == found["shape"][1] and found["padding"] == 0
    assert found["odd prompt"] <= 1e-5


@pytest.mark.parametrize("name", ["boogu-edit", "qwen-image-edit-2509"])
def test_two_pictures_are_encoded_as_by_core(facts, name):
    assert facts[name]["two pictures"] <= 1e-5


@pytest.mark.parametrize("name", [*PLAIN, "boogu-edit"])
def test_the_empty_prompt_is_encoded_as_by_core(facts, name):
    assert facts[name]["empty prompt"] <= 1e-5


@pytest.mark.parametrize("name", PLAIN)
def test_the_vlm_from_a_clip_gives_the_same(facts, name):
    assert facts[name]["by ClipVLM"] <= 1e-5 and facts[name]["rewrite by ClipVLM"] <= 1e-5


@pytest.mark.parametrize("name", CLASSES)
def test_the_chat_text_is_cores(facts, name):
    # core's template for edits without a picture is that of its first edit model
    assert facts[name]["template"] == (name != "qwen-image-edit-2509")


@pytest.mark.parametrize("name", CLASSES)
def test_the_dict_beside_the_states_says_what_core_says(facts, name):
    found = facts[name]
    assert found["core's keys"] == [] and not found["core's pooled"]
    assert found["core's mask is ones"] and found["mask is ones"]
    assert found["keys"] == (["attention_mask"] if name.startswith("boogu") else [])


@pytest.mark.parametrize("name", CLASSES)
def test_cores_dit_samples_with_it(facts, name):
    found = facts[name]
    assert found["class"] == CLASSES[name] and found["finite"] and found["rewrite differs"] > 1e-3


@pytest.mark.parametrize("name", CLASSES)
def test_pictures_then_words_is_exact_in_steps(facts, name):
    assert facts[name]["core's ranges"] == 0 and facts[name]["words alone"] > 1e-4


@pytest.mark.parametrize("name", CLASSES)
def test_the_node_says_what_it_keeps_and_warns_of_pictures(facts, name):
    found = facts[name]
    assert "(6 image)" in found["of pictures"] and "(13 rewrite)" in found["of words"]
    assert ("not trained on image tokens" in found["of pictures"]) == (name not in EDIT)
    assert "Warning" not in found["shown"] and "Warning" not in found["of words"]


@pytest.mark.parametrize("name", [name for name in CLASSES if name != "ideogram4"])
def test_reference_latents_go_along(facts, name):
    """Core's Ideogram 4 reads none."""
    assert facts[name]["a reference latent differs"] > 1e-5


def test_another_vlm_or_none_is_refused(facts):
    none, another, layers = facts["refused"]
    assert "Qwen-Image was trained behind the VLM's final norm: connect vlm" in none
    assert "hidden comes from qwen2_5_vl-28x32-" in another and "but vlm is qwen3_vl-36x32-" in another
    assert "lack [36]" in layers and "set profile of UniFusion Rewrite to boogu" in layers


def test_cores_ideogram_encoder_with_eyes_norms_the_last_tap(facts):
    """A difference within core: its small encoder, and diffusers, take that tap raw, as we do."""
    found = facts["ideogram4 by its whole VLM"]
    assert found["first twelve"] <= 1e-5 < 0.1 < found["last"] and found["last, normed"] <= 1e-5
