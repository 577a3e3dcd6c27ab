"""Pictures drawn again from their image tokens alone, at several numbers of tiles.

192-px scenes hold things with details that no words carry: a thumbnail shows a third of the pixels along a side, four
tiles two thirds, nine all of them. (At 128 px four tiles show them all, and nine only enlarge them.)
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from ..conditioning.vlm import Request
from ..microworld.oracle import exact, read
from ..microworld.render import render
from ..microworld.scene import MOST_CELLS, Scene, sample_scene
from ..pipeline import UniFusion
from .micro import Progress, Values, collect, draw, round_trip, things_at
from .perceptual import Distance, load_lpips
from .report import nest, score

MODELS = ("micro", "micro-base")
CELLS = 6  # along a side of the canvas: as many pixels as nine tiles have
BATCH_SIZE = 10
PSNR_LIMIT = 99.0  # dB, of equal pictures
PROMPT = "describe the image"  # stands behind the image tokens, which cannot see it


def evaluate(
    load_model: Callable[[str], UniFusion],
    *,
    tiles: Sequence[int] = (1, 4, 9),
    cells: int = CELLS,
    num: int = 100,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Scores reconstruction by "micro", with "micro-base" beside.

    Args:
        tiles: numbers of tiles, each a square; beyond 1 a thumbnail is added.
        cells: of 32 px along a side; 4, the largest canvas in training, or 6, which no model has seen.
        progress: called with (part, pictures done, pictures of this part).
    Returns:
        tiles.<n>.psnr (dB), ssim, marks, exact without guidance, tiles.<n>.guided with the model's own; the same under
        "micro-base"; controls.vae_round_trip and oracle_on_renders as ceilings; controls.marks_chance: always naming
        the commonest mark. marks: over all things of the truth, the mark read in its cell is its own. lpips stands
        beside psnr where this machine has it; meta.lpips says which, or why not.
    Raises:
        ValueError: a number of tiles that is no square, cells outside 1..6, or `num` below 1.
    """
    sides = {count: math.isqrt(count) if count > 0 else 0 for count in tiles}
    if wrong := [count for count, side in sides.items() if side == 0 or side * side != count]:
        raise ValueError(f"tiles {wrong[0]}: expected square numbers, such as 1, 4, 9")
    if num < 1:
        raise ValueError(f"num {num}: expected at least 1")
    if not 1 <= cells <= MOST_CELLS:
        raise ValueError(f"cells {cells}: expected 1 to {MOST_CELLS}")
    rng = Random(f"reconstruction-{seed}")
    few, many = max(1, cells**2 // 5), max(1, cells**2 * 5 // 8)
    scenes = [sample_scene(rng, rows=cells, columns=cells, count=rng.randint(few, many)) for _ in range(num)]
    truths = [render(scene) for scene in scenes]

    values: Values = defaultdict(list)
    seconds: dict[str, float] = {}
    distance, lpips = load_lpips(min(truths[0].size))
    meta: dict[str, Any] = {"lpips": lpips}
    for name in MODELS:
        model = load_model(name)
        meta[name] = {"name": model.spec.name, "steps": model.spec.steps, "guidance": model.spec.guidance}
        path = () if name == MODELS[0] else (name,)
        for count, side in sides.items():
            part, began = f"reconstruction.{name}.{count}", time.perf_counter()
            for start in range(0, num, BATCH_SIZE):
                batch = slice(start, start + BATCH_SIZE)
                plain, guided = reconstruct(model, truths[batch], side, seed=seed + start)
                for at, images in (((), plain), (("guided",), guided)):
                    found = score_pictures(images, truths[batch], scenes[batch], distance)
                    collect(values, (*path, "tiles", str(count), *at), found)
                if progress:
                    progress(part, min(num, start + BATCH_SIZE), num)
            seconds[part] = round(time.perf_counter() - began, 1)
        if name == MODELS[0]:
            for start in range(0, num, BATCH_SIZE):
                batch = slice(start, start + BATCH_SIZE)
                again = round_trip(model, truths[batch])
                found = score_pictures(again, truths[batch], scenes[batch], distance)
                collect(values, ("controls", "vae_round_trip"), found)
            collect(values, ("controls", "oracle_on_renders"), score_readings(truths, scenes))

    report = nest(values)
    marks = Counter(thing.detail.mark for scene in scenes for thing in scene.things)
    common = marks.most_common(1)[0][1]
    report["controls"]["marks_chance"] = score([1.0] * common + [0.0] * (marks.total() - common))
    meta |= {
        "tiles": list(tiles),
        "cells": cells,
        "num": num,
        "seed": seed,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": seconds,
    }
    return {**report, "meta": meta}


def reconstruct(
    model: UniFusion, pictures: Sequence[Image.Image], side: int, *, seed: int = 0
) -> tuple[list[Image.Image], list[Image.Image]]:
    """Pictures of one size again from the tokens of side x side tiles: without guidance, and with the model's own."""
    requests = [Request(PROMPT, (picture,), grid=(side, side)) for picture in pictures]
    tracks = {"image": model.conditions(model.vlm.encode(requests)).tracks["image"]}
    sizes = pictures[0].size
    return draw(model, tracks, seed, size=sizes, guidance=1.0), draw(model, tracks, seed, size=sizes)


def score_pictures(
    pictures: Sequence[Image.Image],
    truths: Sequence[Image.Image],
    scenes: Sequence[Scene],
    distance: Distance | None = None,
) -> dict[str, list[float]]:
    """psnr, ssim, lpips (given a distance) and exact per picture, marks per thing."""
    pairs = [(np.asarray(one), np.asarray(other)) for one, other in zip(pictures, truths, strict=True)]
    return {
        "psnr": [psnr(*pair) for pair in pairs],
        "ssim": [ssim(*pair) for pair in pairs],
        **({"lpips": [distance(*pair) for pair in pairs]} if distance else {}),
        **score_readings(pictures, scenes),
    }


def score_readings(pictures: Sequence[Image.Image], scenes: Sequence[Scene]) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {"marks": [], "exact": []}
    for picture, scene in zip(pictures, scenes, strict=True):
        reading = read(picture)
        found = things_at(reading)
        values["exact"].append(exact(reading, scene))
        values["marks"] += [
            thing.cell in found and found[thing.cell].detail.mark == thing.detail.mark for thing in scene.things
        ]
    return values


def psnr(image: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 pictures; at most `PSNR_LIMIT`."""
    error = float(np.mean(np.square(image.astype(np.float64) - truth.astype(np.float64))))
    return min(PSNR_LIMIT, 10 * math.log10(255**2 / error)) if error > 0 else PSNR_LIMIT


def ssim(image: np.ndarray, truth: np.ndarray) -> float:
    """Structural similarity of uint8 pictures [H, W, 3], at most 1.

    Gaussian window of 11 px and sigma 1.5, constants (0.01 · 255)² and (0.03 · 255)², each channel by itself, over the
    places where the window fits: Wang et al., "Image quality assessment: from error visibility to structural
    similarity" (2004), Sec. III-B.
    """
    axis = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-axis.square() / (2 * 1.5**2))
    line = line / line.sum()
    window = (line[:, None] * line).expand(3, 1, 11, 11)

    def smooth(x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, window, groups=3)

    x, y = (torch.from_numpy(picture.astype(np.float64)).permute(2, 0, 1)[None] for picture in (image, truth))
    mean_x, mean_y = smooth(x), smooth(y)
    var_x, var_y = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2
    covariance = smooth(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((top / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())
