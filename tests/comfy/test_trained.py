"""The full cycle: shards → stage 1 → stage 2 → export → UniFusionLoadModel in a real ComfyUI → a picture."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLFlux2, AutoencoderKLQwenImage
from PIL import Image

from unifusion_core import cli
from unifusion_core.pipeline import WEIGHTS, save_generator
from unifusion_core.presets import PRESETS
from unifusion_core.training.trainee import build_trainee

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs" / "full_cycle.py"
OPENED = Path(__file__).parent / "scripts" / "trained.py"


@pytest.fixture(scope="module")
def facts(run_in_comfy, tmp_path_factory):
    out = tmp_path_factory.mktemp("cycle")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT), str(out), "--steps", "6", "--samples", "60"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return run_in_comfy(OPENED, str(out / "stage2"))


def test_what_was_trained_opens_and_draws(facts):
    assert facts["picture"] == [1, 64, 64, 3] and facts["spread"] > 0.01


def test_the_vlm_beside_it_is_its_own(facts):
    assert facts["same VLM"]


def autoencoder(channels: int):
    torch.manual_seed(0)
    if channels == 16:
        return AutoencoderKLQwenImage(base_dim=8)
    made = AutoencoderKLFlux2(block_out_channels=(32, 32, 32, 32), layers_per_block=1)
    torch.nn.init.uniform_(made.bn.running_var, 0.2, 3.0)
    return made


@pytest.mark.parametrize("channels", [32, 16])
def test_it_brings_the_vae_it_was_trained_with(channels, run_in_comfy, tmp_path):
    """Of 32 channels, FLUX.2's; of 16, Qwen-Image's."""
    autoencoder(channels).save_pretrained(tmp_path / "vae")
    micro = PRESETS["micro"]()
    spec = replace(micro, name="toy", dit=replace(micro.dit, in_channels=channels, depth=1))
    save_generator(tmp_path / "toy.safetensors", spec, build_trainee(spec, init=None, seed=0, compute=torch.float32))
    (tmp_path / "data").mkdir()
    for name in ("red", "teal"):
        Image.new("RGB", (64, 64), name).save(tmp_path / "data" / f"{name}.png")
        (tmp_path / "data" / f"{name}.txt").write_text("a large red heart")
    words = ["train", "generator", "--init", tmp_path / "toy.safetensors", "--vlm", WEIGHTS / "micro" / "vlm"]
    words += ["--vae", tmp_path / "vae", "--data", tmp_path / "data", "--size", 64, "--tiles", 1, "--batch", 2]
    words += ["--steps", 1, "--device", "cpu", "--quiet", "--out", tmp_path / "out"]
    assert cli.main([*map(str, words)]) == 0
    facts = run_in_comfy(OPENED, str(tmp_path / "out"))
    assert facts["picture"] == [1, 64, 64, 3] and facts["spread"] > 0.01
    assert len(facts["latents"]) == channels * 8 * 8
    assert facts["round trip"] == [1, channels, 8, 8]
    check_odd(facts["odd"], channels)


def check_odd(odd: dict, channels: int) -> None:
    """FLUX.2's takes whole patches of 2x2 latents: pictures are cropped for it, and latents filled up."""
    assert odd["picture"] == [1, 56, 72, 3]
    assert odd["again"] == [1, channels, *((6, 8) if channels == 32 else (7, 9))]
    assert odd["off centre"] < 1e-6 and odd["finite"]
    assert odd["off its padding"] < 1e-6 if channels == 32 else odd["off its padding"] > 0
    assert odd["tiled"] == [[1, 168, 152, 3], [1, channels, *((20, 18) if channels == 32 else (21, 19))]]
    assert f"72 x 7 px: this VAE takes sides of {16 if channels == 32 else 8} px" in odd["refused"]
