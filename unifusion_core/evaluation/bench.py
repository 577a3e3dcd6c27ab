"""Speed as ratios: both sides of each run in one process, in turn, so that they mean the same on any machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from PIL import Image
from torch import nn

from ..condition import Condition, stack
from ..conditioning.verifi import Rewrites, replay
from ..conditioning.vlm import Request
from ..diffusion.flow import timesteps
from ..diffusion.sampler import initial_noise
from ..pipeline import UniFusion
from . import bench_krea2, bench_wide

STEPS, GUIDANCE = 20, 2.5
SHORT, LONG = 5, 24  # most tokens of a rewrite; with 9 tiles before it, SHORT is a thirtieth of what is read
LAP_TOKENS, LAP_CHUNK = 2048, 256
SCHEDULE = "image:0-0.15, text:0.15-1"
PROMPT = "a small yellow star at top-left and a large red heart at bottom-right on a gray background"

Progress = Callable[[str, int, int], None]


def run(model: UniFusion, *, seed: int = 0, repeats: int = 9, progress: Progress | None = None) -> dict[str, Any]:
    """Measures a model on one thread, by CPU seconds: the least of `repeats` turns of each side.

    Args:
        progress: called with (measure, measures done, measures in all).
    Returns:
        `measures`: name → value (None: cannot be measured on this system), target, whether it is met (None: no target
        or no value), and what the value is; JSON-able.
    """
    report: dict[str, Any] = {"model": model.spec.name, "threads": 1, "repeats": repeats, "measures": {}}
    threads = torch.get_num_threads()
    for number, (name, (measure, target, what)) in enumerate(MEASURES.items()):
        if progress:
            progress(name, number, len(MEASURES))
        torch.set_num_threads(1)
        try:
            value = measure(model, seed, repeats)
        finally:
            torch.set_num_threads(threads)
        met = None
        if target and value is not None:
            met = {"<=": value <= target[1], ">=": value >= target[1]}[target[0]]
        written = target and f"{target[0]} {target[1]:.3g}"
        report["measures"][name] = {"value": value, "target": written, "met": met, "what": what}
    return report


def table(report: dict[str, Any]) -> str:
    """A line for each measure: value, target, verdict, meaning."""
    lines = [f"{'measure':22}{'value':>8}  {'target':9}{'':7}of"]
    for name, row in report["measures"].items():
        verdict = {True: "met", False: "MISSED", None: ""}[row["met"]]
        value = "  (n/a)" if row["value"] is None else f"{row['value']:8.3f}"
        lines.append(f"{name:22}{value:>8}  {row['target'] or '-':9}{verdict:7}{row['what']}")
    return "\n".join(lines)


def sampler_overhead(model: UniFusion, seed: int, repeats: int) -> float:
    condition, empty = model.prepare([Request(PROMPT)], max_new_tokens=LONG).tracks["text"], model.empty()
    noise = initial_noise((1, *model.latent_shape((64, 64))), seed, model.device)
    times = timesteps(STEPS, model.spec.shift)

    def ours() -> None:
        model.sample({"text": condition}, steps=STEPS, guidance=GUIDANCE, seed=seed, size=(64, 64))

    @torch.no_grad()
    def bare() -> None:
        for t, _ in pairwise(times):
            _forward(model, noise, t, empty)
            _forward(model, noise, t, condition)

    sampled, forwards = _cpu_seconds(ours, bare, repeats=repeats)
    return sampled / forwards


def capture_overhead(model: UniFusion, seed: int, repeats: int) -> float:
    request = Request(PROMPT)
    ours, plain = _cpu_seconds(
        lambda: model.rewrite([request], max_new_tokens=LONG),
        lambda: _plain_generate(model, request, LONG),
        repeats=repeats,
    )
    return ours / plain


def single_pass_text(model: UniFusion, seed: int, repeats: int) -> float:
    return _two_passes_over_one(model, Request(PROMPT), LONG, repeats)


def single_pass_image(model: UniFusion, seed: int, repeats: int) -> float:
    return _two_passes_over_one(model, _tiled_request(), SHORT, repeats)


def _two_passes_over_one(model: UniFusion, request: Request, max_new_tokens: int, repeats: int) -> float:
    def once() -> Rewrites:
        return model.rewrite([request], max_new_tokens=max_new_tokens)

    def twice() -> None:
        _plain_generate(model, request, max_new_tokens)
        replay(model.vlm, [request], ids)

    remembered, model.vlm.prefix_cache = model.vlm.prefix_cache, None  # neither may find the pictures read already
    try:
        ids = once().token_ids
        one, two = _cpu_seconds(once, twice, repeats=repeats)
    finally:
        model.vlm.prefix_cache = remembered
    return two / one


def lap_chunks(model: UniFusion, seed: int, repeats: int) -> float:
    spec = model.lap.spec
    weight = next(model.lap.parameters())
    states = torch.randn(
        1, LAP_TOKENS, spec.num_layers, spec.width, generator=torch.Generator().manual_seed(seed % 2**63)
    ).to(weight)
    chunked, naive = _cpu_seconds(
        lambda: model.lap(states, chunk_size=LAP_CHUNK), lambda: model.lap(states), repeats=repeats
    )
    return chunked / naive


def short_empty(model: UniFusion, seed: int, repeats: int) -> float:
    condition, empty = model.prepare([_tiled_request()], max_new_tokens=SHORT).tracks["all"], model.empty()
    noise = initial_noise((1, *model.latent_shape((64, 64))), seed, model.device)
    both, pair = stack([condition, empty]), noise.expand(2, -1, -1, -1)
    half = torch.tensor(0.5)

    def separate() -> None:
        _forward(model, noise, half, condition)
        _forward(model, noise, half, empty)

    padded, short = _cpu_seconds(lambda: _forward(model, pair, half, both), separate, repeats=3 * repeats)
    return padded / short


def switch_forwards(model: UniFusion, seed: int, repeats: int) -> float:
    conditions = model.prepare([_tiled_request()], max_new_tokens=SHORT)
    with _counted(model.dit) as forwards:
        model.sample(conditions, schedule=SCHEDULE, steps=STEPS, guidance=1.0, seed=seed)
    return float(len(forwards) - STEPS)


def picture_seconds(model: UniFusion, seed: int, repeats: int) -> float:
    def seconds() -> float:
        start = time.perf_counter()
        model.generate(PROMPT, steps=STEPS, seed=seed)
        return time.perf_counter() - start

    return min(seconds() for _ in range(min(repeats, 3)))


def _wide(measure: Callable[[int], float]) -> Callable[[UniFusion, int, int], float]:
    return lambda model, seed, repeats: measure(min(repeats, 5))


def _alone(measure: Callable[[], float | None]) -> Callable[[UniFusion, int, int], float | None]:
    return lambda model, seed, repeats: measure()


MEASURES: dict[str, tuple[Callable[[UniFusion, int, int], float | None], tuple[str, float] | None, str]] = {
    "sampler_overhead": (sampler_overhead, ("<=", 1.03), f"{STEPS} guided steps to their bare DiT forwards"),
    "capture_overhead": (capture_overhead, ("<=", 1.05), "VERIFI to transformers' own generate of the same tokens"),
    "capture_time": (_wide(bench_wide.capture_time), ("<=", 1.03), "28 layers, every third kept, to none kept"),
    "capture_memory": (
        _alone(bench_wide.capture_memory),
        ("<=", 10 / 29 + 0.1),
        "what that adds to what all layers add",
    ),
    "single_pass_text": (single_pass_text, (">=", 1.0), "generate, then encode again, to VERIFI's one pass"),
    "single_pass_image": (single_pass_image, (">=", 1.2), "the same, 9 tiles and a short rewrite"),
    "prefix_reuse": (
        _wide(bench_wide.prefix_reuse),
        (">=", 2.5),
        "a new instruction on 8 pictures, read again to known",
    ),
    "lap_memory": (_alone(bench_wide.lap_memory), ("<=", 0.2), "peak of LAP by chunks to at once, 2860 tokens"),
    "load_memory": (_alone(bench_wide.load_memory), ("<=", 0.1), "resident memory a load adds, to the file"),
    "lap_chunks": (lap_chunks, ("<=", 1.05), f"LAP of {LAP_TOKENS} tokens by {LAP_CHUNK} to all at once"),
    "short_empty": (short_empty, (">=", 1.3), "guidance with the empty condition padded to its short one"),
    "krea2_diffusers": (
        _wide(bench_krea2.against_diffusers),
        ("<=", 1.02),
        "a Krea 2 picture, equal to 1e-4, to diffusers' pipeline",
    ),
    "switch_forwards": (switch_forwards, ("<=", 0.0), "DiT forwards that a schedule's switch adds"),
    "picture_seconds": (picture_seconds, None, f"wall seconds of a picture: VERIFI, {STEPS} steps, decoding"),
}


def _forward(model: UniFusion, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
    times = torch.full((len(x),), t.item(), device=x.device)
    return model.dit(x, times, condition.tokens, condition.mask, condition.positions)


def _plain_generate(model: UniFusion, request: Request, max_new_tokens: int) -> None:
    """What anyone would do without VERIFI; one token more, which `rewrite` needs to see that it may stop."""
    vlm = model.vlm
    prompts = vlm.prepare([request], room=max_new_tokens + 1)
    vlm.model.generate(
        input_ids=prompts.ids,
        attention_mask=prompts.mask.long(),
        max_new_tokens=max_new_tokens + 1,
        do_sample=False,
        suppress_tokens=list(vlm.image_token_ids) or None,
        **prompts.inputs,
    )


def _tiled_request() -> Request:
    return Request(PROMPT, (Image.new("RGB", (192, 192), "gray"),), grid=(3, 3))


@torch.no_grad()
def _cpu_seconds(*sides: Callable[[], object], repeats: int) -> list[float]:
    """The least CPU time of each side, taken in turn, forth and back, after a warm-up."""
    least = [float("inf")] * len(sides)
    for turn in range(repeats + 1):
        for number in range(len(sides))[:: 1 if turn % 2 else -1]:
            start = time.process_time()
            sides[number]()
            if turn:
                least[number] = min(least[number], time.process_time() - start)
    return least


@contextmanager
def _counted(module: nn.Module) -> Iterator[list[None]]:
    calls: list[None] = []
    handle = module.register_forward_hook(lambda *_: calls.append(None))
    try:
        yield calls
    finally:
        handle.remove()
