"""LPIPS, where this machine has it: a learned distance between pictures, 0 for equal ones.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (2018), AlexNet, version 0.1.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

ALEXNET = "alexnet-owt-7be5be79.pth"  # torchvision's file, which the package would fetch from the network

LEAST_SIDE = 64  # px; AlexNet pools smaller pictures away

Distance = Callable[[np.ndarray, np.ndarray], float]


def load_lpips(side: int = LEAST_SIDE) -> tuple[Distance | None, str]:
    """Returns a distance of two uint8 pictures [H, W, 3], and what to say of it.

    Nothing is downloaded: without the package `lpips`, or without AlexNet's weights in torch's cache, the distance is
    None and the words say what is missing.

    Args:
        side: the shortest of the pictures, in px.
    """
    if side < LEAST_SIDE:
        return None, f"not for pictures below {LEAST_SIDE} px"
    if find_spec("lpips") is None:
        return None, "not installed (pip install lpips)"
    weights = Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET
    if not weights.is_file():
        return None, f"installed, but AlexNet's weights are not at {weights}; torchvision fetches them there"
    import lpips

    network = lpips.LPIPS(net="alex", verbose=False)

    @torch.no_grad()
    def distance(image: np.ndarray, truth: np.ndarray) -> float:
        return float(network(_signed(image), _signed(truth)))

    return distance, "alex 0.1"


def _signed(picture: np.ndarray) -> torch.Tensor:
    """[1, 3, H, W] in -1..1."""
    return torch.from_numpy(picture.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
