"""Krea 2 in a real ComfyUI: core's own graph and ours on one file are one picture, from words or states to latents."""

from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "scripts"
SAME = 1e-5  # relative, over four steps in float32


@pytest.fixture(scope="module")
def facts(run_in_comfy):
    return run_in_comfy(SCRIPTS / "krea2.py")


def test_lap_and_refiner_give_what_cores_text_fusion_gives(facts):
    assert facts["parity"]["fusion"] < SAME


@pytest.mark.parametrize(
    "way",
    ["Load Model", "Fusion from Model", "Schedule for any Model", "one batch for both", "two pictures", "dpmpp_2m"]
    + ["UniFusion Sampler", "UniFusion Sampler, flow", "SamplerCustomAdvanced", "reference latents"],
)
def test_fused_tokens_draw_cores_picture(facts, way):
    assert facts["parity"][way] < SAME


def test_a_negative_of_cores_own_goes_with_a_fused_positive(facts):
    assert facts["parity"]["negative of core's"] < SAME


def test_cores_own_conditioning_is_untouched(facts):
    assert facts["parity"]["both of core's"] == 0


@pytest.mark.parametrize("way", ["compiled", "compiled before"])
def test_torch_compile_takes_fused_tokens(facts, way):
    assert facts["parity"][way] < SAME


def test_the_model_keeps_its_names_and_patches(facts):
    assert facts["untouched"] == {
        "state dict": True,
        "names of LoRA": True,
        "class name": "SingleStreamDiT",
        "object patches": 0,
        "given model has wrappers": False,
    }


def test_lora_reaches_dit_and_fusion(facts):
    assert facts["weights"]["LoRA"] < SAME
    assert facts["weights"]["UniFusion Load LoRA"] < SAME
    assert facts["weights"]["LoRA does something"] > 0.1


@pytest.mark.parametrize("name", ["from a loaded model", "from what it gave"])
def test_the_same_fusion_comes_out_whatever_was_done_before(facts, name):
    assert facts["weights"][name] == 0


@pytest.mark.parametrize(
    "name", ["fp8 old", "fp8 new", "fp8 old, Fusion from Model", "fp8 new, Fusion from Model", "bf16", "bf16 in fp32"]
)
def test_files_of_every_kind_draw_cores_picture(facts, name):
    assert facts["weights"][name] < SAME


def test_lora_on_fp8_differs_by_cores_rounding_alone(facts):
    assert facts["weights"]["LoRA on fp8"] < 0.02  # core rounds the patched weights to fp8 again, we do not


def test_image_then_text_follows_the_schedule(facts):
    schedule = facts["schedule"]
    assert schedule["image then text"] < SAME < 0.01 < schedule["differs from text alone"]
    assert schedule["all is all"] == 0


def test_cross_fades_mix_predictions_or_tokens(facts):
    assert facts["schedule"]["cross-fade"] < SAME
    assert facts["schedule"]["cross-fade of tokens differs"] > 0.001


def test_layer_dropout_is_a_zero_in_cores_projector(facts):
    assert facts["layers"]["dropout"] < SAME < 0.01 < facts["layers"]["dropout does something"]


def test_the_inspector_draws_every_figure(facts):
    assert len(facts["layers"]["figures"]) == 4
    assert all(shape[0] == 1 and shape[2:] == [1024, 3] for shape in facts["layers"]["figures"].values())


def test_padding_never_reaches_the_model(facts):
    assert facts["tokens"]["padding is left out"] == 0
    assert facts["tokens"]["concatenated"] > 0.01
    assert facts["tokens"]["zeroed"]


def test_words_through_our_nodes_draw_cores_picture(facts):
    encoder = facts["text encoder"]
    ours, theirs = encoder["tokens"][:2], encoder["tokens"][2:]
    assert ours[0] == ours[1] > theirs[0] == theirs[1]
    assert encoder["latents"] < SAME


def test_rewrites_and_pictures_condition_it_too(facts):
    encoder = facts["text encoder"]
    others = encoder["rewritten"], *encoder["image, then text"].values()
    assert len(others) == 3 and all(0.01 < other < 10 for other in others)


def test_the_vae_comes_from_models_vae_or_says_which(facts):
    vae = facts["vae"]
    assert "qwen_image_vae" in vae["missing"] and "core's Load VAE" in vae["missing"]
    assert vae["changes the fingerprint"]
    assert vae["image"] == [2, 32, 32, 3] and vae["differs from core's"] == 0


def test_files_are_listed_by_what_is_in_them(facts):
    files = facts["files"]
    assert files["listed"] == ["diffusion_models/krea2.safetensors", "checkpoints/whole.safetensors"]
    assert files["with core's prefix"] == 0
    assert files["can be loaded again"] == "load_diffusion_model"
    assert files["spec"] == ["krea2", list(range(2, 36, 3))]


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("pooled", "connect UniFusion Refine in between"),
        (
            "another width",
            "width 77 into Krea 2, which takes 44, from UniFusion Refine with this model's fusion, or 480",
        ),
        ("rows of two lengths", "rows of [9, 7] tokens: Krea 2 reads no mask"),
        ("another model", "model is UniFusionModel: only Krea 2 carries a fusion head"),
        ("a tensor less", "first txtfusion.refiner_blocks.1.attn.wq.weight; copy the file again"),
        ("a tensor less, of those that tell the size", "first first.weight; copy the file again"),
        ("layers of another VLM", "12 layers"),
    ],
)
def test_a_wrong_graph_is_told_the_cure(facts, case, told):
    assert told in facts["errors"][case]
