"""LPIPS where it is installed, which it is not here: a stand-in checks what it is given."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from unifusion_core.evaluation import perceptual, reconstruction
from unifusion_core.evaluation.perceptual import load_lpips


@pytest.fixture
def package(monkeypatch, tmp_path):
    """A package `lpips` whose distance is the mean absolute difference."""
    module = ModuleType("lpips")
    module.seen = []

    class LPIPS:
        def __init__(self, **options):
            module.seen.append(options)

        def __call__(self, one, other):
            module.seen.append((one, other))
            return (one - other).abs().mean().reshape(1, 1, 1, 1)

    module.LPIPS = LPIPS
    module.__spec__ = object()
    monkeypatch.setitem(sys.modules, "lpips", module)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    return module


def test_without_the_package_it_says_so(monkeypatch):
    monkeypatch.setattr(perceptual, "find_spec", lambda name: None)
    assert load_lpips() == (None, "not installed (pip install lpips)")


def test_nothing_is_downloaded(package, tmp_path):
    distance, words = load_lpips()
    assert distance is None and str(tmp_path) in words and package.seen == []


def test_pictures_go_in_as_the_package_takes_them(package, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / perceptual.ALEXNET).touch()
    assert load_lpips(32)[0] is None
    distance, words = load_lpips()
    black, white = (np.full((64, 70, 3), value, np.uint8) for value in (0, 255))
    assert distance(black, white) == pytest.approx(2) and distance(white, white) == 0 and words == "alex 0.1"
    assert package.seen[0] == {"net": "alex", "verbose": False}
    one, other = package.seen[1]
    assert one.shape == (1, 3, 64, 70) and one.min() == -1 and other.max() == 1


def test_it_stands_beside_the_other_measures():
    values = reconstruction.score_pictures([], [], [])
    assert "lpips" not in values
    assert reconstruction.score_pictures([], [], [], lambda one, other: 0.5)["lpips"] == []


def test_ssim_agrees_with_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    rng = np.random.default_rng(0)
    one = rng.integers(0, 256, (40, 52, 3), dtype=np.uint8)
    other = np.clip(one + rng.normal(0, 25, one.shape), 0, 255).astype(np.uint8)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    wanted = metrics.structural_similarity(one, other, channel_axis=2, **options)
    assert reconstruction.ssim(one, other) == pytest.approx(wanted, abs=1e-6)
