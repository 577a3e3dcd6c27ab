"""The loaders list UniFusion's files and VLM folders, and open nothing else."""

from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "scripts"
WEIGHTS = Path(__file__).parents[2] / "unifusion_core" / "weights" / "micro"


@pytest.fixture(scope="module")
def facts(run_in_comfy):
    return run_in_comfy(SCRIPTS / "files.py", str(WEIGHTS))


def test_lists_models_by_what_is_in_them(facts):
    embedded, stage_1, *rest = facts["models"]
    assert (embedded, stage_1) == ("micro (embedded)", "micro-base (embedded, stage 1)")
    assert sorted(rest) == ["unifusion/big.safetensors.index.json", "unifusion/mine/base.safetensors"]


def test_an_adapter_is_known_by_its_header(facts):
    assert facts["adapters"] == ["mine/lap.safetensors"]


def test_each_header_is_read_once_and_none_of_what_a_training_keeps(facts):
    mine = {f"unifusion/mine/{name}.safetensors" for name in ("base", "vae", "lap")}
    assert mine <= set(facts["opened"]) and len(facts["opened"]) == len(set(facts["opened"]))
    assert not [name for name in facts["opened"] if "/cache/" in name or "/state/" in name]


def test_lists_vlm_folders(facts):
    assert facts["vlms"] == ["micro (embedded)", "vlm/qwen", "unifusion/mine/vlm"]


def test_a_folder_of_our_recipes_loads_whole(facts):
    assert facts["loads"] == ["UniFusionModel", "micro", 8, "internvl"]


def test_only_listed_names_open(facts):
    assert len(facts["refused"]) == 4
    assert all("is not on this server" in message for message in facts["refused"].values())


@pytest.fixture(scope="module")
def options(run_in_comfy):
    return run_in_comfy(SCRIPTS / "vlm_options.py", str(WEIGHTS))


def test_a_single_file_of_qwen_loads_with_comfyuis_tokenizer(options):
    assert options["listed"][-1] == "text_encoders/qwen3vl_tiny.safetensors"
    family, layers, shape, text = options["single"]
    assert (family, layers, text) == ("qwen3_vl", 4, "a big red heart") and shape[2:] == [1, 32]


def test_an_offloaded_vlm_writes_the_same_and_stays_out_of_comfyuis_hands(options):
    first, second = options["words"]
    assert first and first == second
    assert options["same copy"] and options["own copy"] and options["patcher holds"] == [True, False]


def test_a_quantisation_needs_its_package(options):
    assert "pip install bitsandbytes" in options["refused"]["package"]
    assert "nonsense" in options["refused"]["name"]
