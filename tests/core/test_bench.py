import json
from dataclasses import replace

import pytest
import torch

from unifusion_core.evaluation import bench, bench_gpu, bench_wide
from unifusion_core.pipeline import load_model
from unifusion_core.presets import unifusion_8b

from .test_cli import save_fake_model

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(save_fake_model(tmp_path_factory.mktemp("model")))


def test_the_report_has_every_measure_and_can_be_printed(model, monkeypatch):
    monkeypatch.setattr(bench, "LONG", 3)
    monkeypatch.setattr(bench, "STEPS", 2)
    monkeypatch.setattr(bench, "LAP_TOKENS", 64)
    monkeypatch.setattr(bench.bench_krea2, "SIZE", 64)
    for name in ("capture_time", "prefix_reuse", "capture_memory", "lap_memory", "load_memory"):  # minutes; see below
        monkeypatch.setitem(bench.MEASURES, name, (lambda *_: 0.1, *bench.MEASURES[name][1:]))
    monkeypatch.setitem(bench.MEASURES, "load_memory", (lambda *_: None, *bench.MEASURES["load_memory"][1:]))
    monkeypatch.setitem(bench.MEASURES, "picture_seconds", (lambda *_: 1.5, None, "a picture"))
    progress = []
    report = bench.run(model, repeats=1, progress=lambda *now: progress.append(now))
    assert report == json.loads(json.dumps(report)) and list(report["measures"]) == list(bench.MEASURES)
    unmeasured = report["measures"].pop("load_memory")
    assert unmeasured["value"] is unmeasured["met"] is None
    assert all(row["value"] > 0 for name, row in report["measures"].items() if name != "switch_forwards")
    report["measures"]["load_memory"] = unmeasured
    assert [name for name, _, _ in progress] == list(bench.MEASURES)
    lines = bench.table(report).splitlines()
    assert len(lines) == 1 + len(bench.MEASURES) and "1.500  -" in lines[-2] and "(n/a)" in lines[-1]


def test_a_switch_of_schedule_costs_no_forward(model):
    assert bench.switch_forwards(model, seed=0, repeats=1) == 0


def test_verdicts_follow_the_targets(model, monkeypatch):
    measures = {"low": (lambda *_: 1.0, ("<=", 1.03), "x"), "high": (lambda *_: 1.0, (">=", 1.2), "y")}
    monkeypatch.setattr(bench, "MEASURES", measures)
    rows = bench.run(model)["measures"]
    assert rows["low"]["met"] is True and rows["high"]["met"] is False
    assert rows["low"]["target"] == "<= 1.03" and "MISSED" in bench.table(bench.run(model))


def test_the_benchmark_leaves_the_number_of_threads_alone(model, monkeypatch):
    monkeypatch.setattr(bench, "MEASURES", {"threads": (lambda *_: torch.get_num_threads(), None, "x")})
    torch.set_num_threads(2)
    assert bench.run(model)["measures"]["threads"]["value"] == 1 and torch.get_num_threads() == 2
    torch.set_num_threads(1)


@pytest.fixture
def small_wide(monkeypatch):
    sizes = {"LAYERS": 3, "WIDTH": 32, "INTERMEDIATE": 32, "TOKENS": 70, "WORDS": 2, "LAP_TOKENS": 300, "PICTURES": 4}
    for name, value in sizes.items():
        monkeypatch.setattr(bench_wide, name, value)
    for made in (bench_wide._folder, bench_wide._wide):
        made.cache_clear()
    yield bench_wide
    for made in (bench_wide._folder, bench_wide._wide):
        made.cache_clear()


def test_the_measures_on_a_wide_vlm_run_at_toy_size(small_wide):
    assert small_wide.capture_time(1) > 0 and small_wide.prefix_reuse(1) > 0


@pytest.mark.skipif(not bench_wide.CLEAR.exists(), reason="peaks are read from Linux's /proc")
def test_peaks_are_measured_in_a_process_of_its_own(small_wide):
    for variant in ("pass", "pass-third", "pass-all", "lap-naive", "lap-chunked", "load"):
        assert isinstance(small_wide._measure(variant, str(small_wide._folder())), int)
    assert small_wide._peak("load") is not None
    with pytest.raises(ValueError, match="'nonsense' failed"):
        small_wide._peak("nonsense")


def test_the_gpu_measures_run_at_toy_size_on_a_cpu(monkeypatch):
    """Their numbers mean nothing here; that the script is whole is what counts where no card is at hand."""
    spec = replace(
        unifusion_8b(),
        dit=replace(unifusion_8b().dit, depth=1, num_heads=1, intermediate_size=8, condition_width=32),
        lap=replace(unifusion_8b().lap, width=32, num_heads=1, intermediate_size=8),
        refiner=replace(unifusion_8b().refiner, width=32, num_heads=1, intermediate_size=8),
    )
    text = {"hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 1}
    text |= {"num_key_value_heads": 1, "layer_types": ["full_attention"] * 3, "vocab_size": 215}
    for name, value in {"unifusion_8b": lambda: spec, "TEXT": text, "DEVICE": "cpu", "DTYPE": torch.float32}.items():
        monkeypatch.setattr(bench_gpu, name, value)
    for name, value in {"SIZE": 64, "CONDITION_TOKENS": 5, "WORDS": 3}.items():
        monkeypatch.setattr(bench_gpu, name, value)
    for name, (measure, _, _) in bench_gpu.MEASURES.items():
        if name != "dit_mfu_compiled":  # minutes of a compiler
            assert measure(1e12, 1) > 0, name


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which would be measured")
def test_without_a_gpu_the_script_says_so():
    with pytest.raises(ValueError, match="no CUDA device"):
        bench_gpu.run()
