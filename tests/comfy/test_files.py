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


def test_lists_vlm_folders(facts):
    assert facts["vlms"] == ["micro (embedded)", "vlm/qwen", "unifusion/mine/vlm"]


def test_a_folder_of_our_recipes_loads_whole(facts):
    assert facts["loads"] == ["UniFusionModel", "micro", 8, "internvl"]


def test_only_listed_names_open(facts):
    assert len(facts["refused"]) == 4
    assert all("is not on this server" in message for message in facts["refused"].values())
