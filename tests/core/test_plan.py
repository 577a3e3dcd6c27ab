import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from unifusion_core.presets import PRESETS, micro
from unifusion_core.training import plan
from unifusion_core.training import plan_adapter as adapters
from unifusion_core.training.plan import Stage, memory, parameters, sample_flops

ROOT = Path(__file__).parents[2]
STAGE = Stage(name="toy", steps=10, batch=64, size=64, tiles=1)


@pytest.mark.parametrize("name", ["unifusion-8b", "unifusion-8b-gemma3-12b"])
def test_the_papers_model_has_eight_billion_parameters(name):
    assert parameters(PRESETS[name]())["dit"] == pytest.approx(8e9, rel=0.03)


def test_a_dense_layer_costs_two_flops_a_weight_and_token():
    """Most of a large DiT is matrices, so its forward lies a little above 2 * parameters * tokens."""
    spec = PRESETS["unifusion-8b"]()
    stage = replace(STAGE, size=512, tiles=1)
    tokens = stage.tokens + (512 // 16) ** 2
    forward = (sample_flops(spec, stage, checkpointing=False) - 2 * 7.94e9 * stage.tokens) / 3
    dense = 2 * (parameters(spec)["dit"] * tokens + 10 * parameters(spec)["lap"] * stage.tokens)
    assert 0.9 < forward / dense < 1.3


def test_checkpointing_costs_a_third_more_of_what_is_trained():
    spec = micro()  # whose VLM the plan does not know, and leaves out
    assert sample_flops(spec, STAGE) == pytest.approx(sample_flops(spec, STAGE, checkpointing=False) * 4 / 3)


def test_fsdp_shares_the_weights_and_nothing_else():
    spec = PRESETS["unifusion-8b"]()
    one, eight = memory(spec, STAGE, 1, 1), memory(spec, STAGE, 8, 1)
    trained = sum(parameters(spec).values())
    assert one["weights, gradients, optimizer"] == trained * 16 == 8 * eight["weights, gradients, optimizer"]
    assert one["activations"] == eight["activations"] and one["frozen VLM"] == eight["frozen VLM"]
    assert one["blocks gathered"] == 0 < eight["blocks gathered"]


def test_the_plan_counts_every_sample_once():
    report = plan.plan(micro(), (1, 2), (STAGE,))
    assert report == json.loads(json.dumps(report))
    for row in report["costs"]:
        assert row["per_gpu_batch"] * row["accumulation"] * row["gpus"] == STAGE.batch
        assert row["flops"] == pytest.approx(sample_flops(micro(), STAGE) * 640)
    days = [row["days"] for row in report["costs"]]
    assert days[0] == pytest.approx(2 * days[1])
    assert "toy" in plan.table(report) and "computed, not measured" in plan.table(report)


def test_no_gpus_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        plan.plan(micro(), (0,), (STAGE,))


@pytest.mark.parametrize("name", adapters.HOSTS)
def test_an_adapter_trains_lap_alone(name):
    report = adapters.plan_adapter(name, (1, 8), (STAGE,))
    one, eight = (report["memory"][f"toy, {gpus} GPUs"] for gpus in (1, 8))
    assert one["weights, gradients, optimizer"] == 16 * report["parameters"]["LAP"] == 16 * adapters.trained(name)
    assert eight["frozen DiT"] == one["frozen DiT"] == 2 * report["frozen"]["DiT"]
    host, length = adapters.HOSTS[name], STAGE.tokens + 16
    frozen = 6 * host.parameters * length + 2 * host.vlm_parameters * STAGE.tokens
    dense = 4 * 2 * adapters.trained(name) * adapters.num_layers(name) * STAGE.tokens
    assert 0.8 < (adapters.sample_flops(name, STAGE) - frozen) / dense < 1.3


def test_an_adapter_is_planned_with_a_picture_where_its_vlm_sees_one():
    assert adapters.stage_of("boogu").tokens == adapters.stage_of("z-image").tokens + plan.TILE_TOKENS
    assert {**adapters.plan_adapter("boogu-edit"), "preset": "boogu"} == adapters.plan_adapter("boogu")


def test_the_page_on_training_says_what_the_plan_says():
    run = [sys.executable, "-m", "tests.core.make_training_page", "--check"]
    assert subprocess.run(run, cwd=ROOT).returncode == 0, "run python -m tests.core.make_training_page"
