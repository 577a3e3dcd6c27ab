"""The full cycle: shards → stage 1 → stage 2 → export → UniFusionLoadModel in a real ComfyUI → a picture."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs" / "full_cycle.py"


@pytest.fixture(scope="module")
def facts(run_in_comfy, tmp_path_factory):
    out = tmp_path_factory.mktemp("cycle")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT), str(out), "--steps", "6", "--samples", "60"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return run_in_comfy(Path(__file__).parent / "scripts" / "trained.py", str(out / "stage2"))


def test_what_was_trained_opens_and_draws(facts):
    assert facts["picture"] == [1, 64, 64, 3] and facts["spread"] > 0.01


def test_the_vlm_beside_it_is_its_own(facts):
    assert facts["same VLM"]
