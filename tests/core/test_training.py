"""Facts about the training loop, its optimizer, and what the micro recipes feed to it."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from unifusion_core.conditioning.vlm import Request, load_vlm
from unifusion_core.diffusion.vae import VAE, VAESpec
from unifusion_core.microworld.caption import caption
from unifusion_core.microworld.scene import HELD_OUT_PAIRS, sample_scene
from unifusion_core.training import micro_dit, micro_vae, micro_vlm, recipes
from unifusion_core.training.ema import EMA
from unifusion_core.training.loop import LoopSpec, fit
from unifusion_core.training.muon import BatchedMuon, orthogonalize

ROOT = Path(__file__).parents[2]
SPEC = LoopSpec(steps=6, batch_size=4, warmup=1, muon_rate=1e-2, ema_decay=0.9, save_minutes=0, log_every=2)


class Killed(Exception):
    pass


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))


def square_loss(model, x):
    value = (model(x) - x.flip(1)).square().mean()
    return value, {"twice": 2 * value.detach()}


def noise(step, seed, shard):
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(100 * seed + step))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_killed_run_resumes_to_the_same_weights(tmp_path):
    whole = fit(net(), square_loss, noise, SPEC, tmp_path / "whole", device="cpu")

    def dies(step, seed, shard):
        if step == 4:
            raise Killed
        return noise(step, seed, shard)

    with pytest.raises(Killed):
        fit(net(), square_loss, dies, SPEC, tmp_path / "parts", device="cpu")
    resumed = fit(net(), square_loss, noise, SPEC, tmp_path / "parts", device="cpu")
    assert torch.equal(weights(whole), weights(resumed))
    assert not (tmp_path / "parts" / "state.new").exists()


TWO_PROCESSES = """
import sys, torch
from pathlib import Path
from unifusion_core.training.loop import LoopSpec, fit

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 8))
spec = LoopSpec(steps=6, batch_size=4, warmup=1, muon_rate=1e-2, ema_decay=0.9, log_every=2)

def loss(model, x):
    return (model(x) - x.flip(1)).square().mean(), {}

def batch(step, seed, shard):
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(100 * seed + step))[shard[0] :: shard[1]]

fit(model, loss, batch, spec, Path(sys.argv[1]), device="cpu")
torch.save(model.state_dict(), Path(sys.argv[1]) / "weights.pt")
"""


def test_two_processes_train_as_one(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TWO_PROCESSES)
    results = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", "--standalone"]
        subprocess.run([*command, script, folder], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
        results.append(torch.load(folder / "weights.pt", weights_only=True))
    assert all(torch.allclose(results[0][key], results[1][key], atol=1e-5) for key in results[0])


def test_training_lowers_the_loss_and_logs_it(tmp_path):
    model = net()
    before = square_loss(model, noise(0, 0, None))[0]
    fit(model, square_loss, noise, replace(SPEC, steps=60), tmp_path, device="cpu")
    assert square_loss(model, noise(0, 0, None))[0] < 0.7 * before
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 30


def test_the_rate_rises_then_holds_then_falls_to_nothing():
    spec = LoopSpec(steps=100, batch_size=1, warmup=10, decay_fraction=0.5)
    assert spec.rate_factor(0) == 0.1
    assert spec.rate_factor(30) == 1
    assert spec.rate_factor(75) == 0.5
    assert spec.rate_factor(100) == spec.rate_factor(150) == 0


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 8, 24), (2, 24, 8)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape):
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape, generator=torch.Generator().manual_seed(1))))
    assert values.min() > 0.4 and values.max() < 1.3


def test_muon_takes_matrices_only():
    with pytest.raises(ValueError, match=r"\(8,\)"):
        BatchedMuon([nn.Parameter(torch.zeros(8))], lr=1e-3)


def test_the_average_follows_the_weights():
    model = nn.Linear(2, 2)
    ema = EMA(model, decay=0.5)
    for _ in range(60):
        with torch.no_grad():
            model.weight.fill_(3.0)
        ema.update(model)
    ema.copy_to(model)
    assert torch.allclose(model.weight, torch.full((2, 2), 3.0))


@pytest.fixture(scope="module")
def micro(tmp_path_factory):
    """A folder with an untrained micro VLM and VAE, as the first two recipes leave it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("micro")
    tokenizer = micro_vlm.build_tokenizer()
    micro_vlm.save(micro_vlm.build_model(tokenizer), tokenizer, folder / "vlm")
    recipes.save_vae(folder / "vae.safetensors", VAE(VAESpec()))
    return folder


def test_training_feeds_the_very_ids_that_inference_builds(micro):
    vlm = load_vlm(micro / "vlm", dtype=torch.float32)
    collate = micro_vlm.Collator(vlm.tokenizer)
    scene = sample_scene(Random(0))
    row = micro_vlm.Row(tiles=(np.zeros((64, 64, 3), np.uint8),) * 2, prompt="make the red star blue", target=scene)
    prompts = vlm.prepare([Request(row.prompt, (Image.new("RGB", (64, 64)),) * 2)])
    ids = collate([row]).ids[0].tolist()
    assert ids[: prompts.ids.shape[1]] == prompts.ids[0].tolist()
    assert vlm.tokenizer.decode(ids[prompts.ids.shape[1] : -1]) == caption(scene)
    assert ids[-1] == vlm.stop_ids[0]


@pytest.mark.parametrize("keep", ["image", "rewrite", "both"])
def test_training_taps_the_states_that_inference_taps(micro, keep):
    vlm = load_vlm(micro / "vlm", dtype=torch.float32)
    frozen = micro_dit.Frozen(vlm.model, vlm.tokenizer, VAE(VAESpec()))
    scene = sample_scene(Random(1))
    tile = np.full((64, 64, 3), 90, np.uint8)
    sample = micro_dit.Sample(
        row=micro_vlm.Row(tiles=(tile,), prompt="describe the image", target=scene), keep=keep, target=scene
    )
    states, mask, positions = frozen.states([sample])
    rewrite = vlm.tokenizer(caption(scene), add_special_tokens=False).input_ids
    hidden = vlm.encode([Request(sample.row.prompt, (Image.fromarray(tile),))], [rewrite])
    kinds = {"image": ["image"], "rewrite": ["rewrite"], "both": ["image", "rewrite"]}[keep]
    hidden = hidden.select(*kinds)
    assert mask is None
    assert torch.allclose(states, hidden.states, atol=1e-5)
    assert torch.equal(positions, hidden.positions)


def test_the_empty_condition_is_the_one_trained_on(micro):
    vlm = load_vlm(micro / "vlm", dtype=torch.float32)
    frozen = micro_dit.Frozen(vlm.model, vlm.tokenizer, VAE(VAESpec()))
    sample = micro_dit.Sample(row=micro_vlm.Row(), keep="rewrite", target=sample_scene(Random(0)))
    assert torch.allclose(frozen.states([sample])[0], vlm.encode_empty().states, atol=1e-5)


def test_stage1_never_sees_an_edit_and_no_stage_sees_held_out_pairs():
    for batch in (micro_dit.stage1_batch, micro_dit.stage2_batch):
        samples = [s for step in range(12) for group in batch(step, 0, 26) for s in group.samples]
        pairs = {t.pair for s in samples for t in s.target.things}
        assert not pairs & HELD_OUT_PAIRS
        changed = [
            s for s in samples if s.keep == "both" and s.row.prompt.split()[0] not in ("describe", "what", "show")
        ]
        assert bool(changed) == (batch is micro_dit.stage2_batch)
        assert all(len(s.row.per_image or s.row.tiles) <= 1 for s in samples)  # never two references


def test_shards_are_a_partition_of_the_batch():
    whole = micro_dit.stage1_batch(3, 0, 26)
    halves = [micro_dit.stage1_batch(3, 0, 26, (i, 2)) for i in range(2)]
    assert [len(g.samples) for g in whole] == [len(a.samples) + len(b.samples) for a, b in zip(*halves, strict=True)]
    assert torch.equal(micro_vae.batch(0, 0, size=4), micro_vae.batch(0, 0, size=4))


def test_recipes_run_in_order_and_say_what_is_missing(micro, tmp_path):
    with pytest.raises(ValueError, match="micro-vlm"):
        recipes.run("micro-stage1", tmp_path)
    with pytest.raises(ValueError, match="micro-stage1"):
        recipes.run("micro-stage2", micro)
    with pytest.raises(ValueError, match="unknown recipe 'mega'"):
        recipes.run("mega", tmp_path)
    assert recipes.run("micro-stage1", micro, device="cpu", steps=1).is_file()
    assert recipes.run("micro-stage2", micro, device="cpu", steps=1).is_file()
