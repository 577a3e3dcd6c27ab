import json

import pytest
import torch

from unifusion_core.evaluation import bench
from unifusion_core.pipeline import load_model

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
    monkeypatch.setitem(bench.MEASURES, "picture_seconds", (lambda *_: 1.5, None, "a picture"))
    progress = []
    report = bench.run(model, repeats=1, progress=lambda *now: progress.append(now))
    assert report == json.loads(json.dumps(report)) and list(report["measures"]) == list(bench.MEASURES)
    assert all(row["value"] > 0 for name, row in report["measures"].items() if name != "switch_forwards")
    assert [name for name, _, _ in progress] == list(bench.MEASURES)
    lines = bench.table(report).splitlines()
    assert len(lines) == 1 + len(bench.MEASURES) and "1.500  -" in lines[-1]


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
