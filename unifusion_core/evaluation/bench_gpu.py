"""What only a GPU shows: the paper's sizes in bf16, random weights, against the card's peak and transformers' loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..conditioning.lap import LayerwiseAttentionPooling
from ..conditioning.vlm import FrozenVLM, Request
from ..conditioning.vlm.internvl import InternVL
from ..diffusion.dit import DiT
from ..presets import unifusion_8b

WEIGHTS = Path(__file__).parents[1] / "weights" / "micro" / "vlm"
DEVICE, DTYPE = "cuda", torch.bfloat16
SIZE, CONDITION_TOKENS = 1024, 2860  # px; ten views of 256 tokens and 300 words
WORDS = 128  # decoded
# dense bf16 FLOP/s of the data sheets, by a part of the card's name
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}

Progress = Callable[[str, int, int], None]


def run(*, repeats: int = 5, progress: Progress | None = None) -> dict[str, Any]:
    """Measures on the first CUDA device; the report is `bench.run`'s.

    Raises:
        ValueError: there is no CUDA device, or its peak is not known.
    """
    if not torch.cuda.is_available():
        raise ValueError("no CUDA device on this machine: run `unifusion bench --gpu` where there is one")
    name = torch.cuda.get_device_name()
    peak = next((flops for part, flops in PEAKS.items() if part in name), None)
    if peak is None:
        raise ValueError(f"the bf16 peak of {name!r} is not known; known are {', '.join(PEAKS)}: add it to PEAKS")
    rows = {}
    for number, (key, (measure, target, what)) in enumerate(MEASURES.items()):
        if progress:
            progress(key, number, len(MEASURES))
        value = measure(peak, repeats)
        torch.cuda.empty_cache()
        met = {">=": value >= target[1], "<=": value <= target[1]}[target[0]]
        rows[key] = {"value": value, "target": f"{target[0]} {target[1]:g}", "met": met, "what": what}
    return {"model": f"random weights on {name}", "peak_flops": peak, "repeats": repeats, "measures": rows}


def dit_forward(peak: float, repeats: int, *, compiled: bool = False) -> float:
    """Share of the card's peak that an 8B DiT reaches in one forward at 1024 px."""
    spec = unifusion_8b().dit
    with torch.device("meta"):
        shape = DiT(spec)
    inputs = _dit_inputs(spec, "meta")
    flops = _flops(partial(shape, *inputs))
    dit = _random(shape)
    if compiled:
        for block in dit.blocks:
            block.compile(dynamic=False)
    inputs = _dit_inputs(spec, DEVICE)
    return flops / _seconds(lambda: dit(*inputs), repeats) / peak


def lap_floor(peak: float, repeats: int) -> float:
    """Time of LAP over 2860 tokens of ten layers, over what its FLOPs take at the card's peak."""
    spec = unifusion_8b().lap
    with torch.device("meta"):
        shape = LayerwiseAttentionPooling(spec)
    size = (1, CONDITION_TOKENS, spec.num_layers, spec.width)
    flops = _flops(partial(shape, torch.empty(size, device="meta")))
    lap = _random(shape)
    states = torch.randn(size, device=DEVICE, dtype=DTYPE)
    return _seconds(lambda: lap(states), repeats) * peak / flops


def decode_capture(peak: float, repeats: int) -> float:
    """Tokens per second of VERIFI, over those of transformers' own `generate`."""
    vlm = _vlm()
    plain = _seconds(lambda: _generate(vlm), repeats)
    return plain / _seconds(lambda: _rewrite(vlm), repeats)


def decode_static(peak: float, repeats: int) -> float:
    """Tokens per second of VERIFI with a static cache and compilation, over those without."""
    vlm = _vlm()
    eager = _seconds(lambda: _rewrite(vlm), repeats)
    return eager / _seconds(lambda: _rewrite(vlm, static=True), repeats, warm=3)


MEASURES: dict[str, tuple[Callable[[float, int], float], tuple[str, float], str]] = {
    "dit_mfu": (dit_forward, (">=", 0.45), f"8B DiT forward at {SIZE} px to the bf16 peak, eager"),
    "dit_mfu_compiled": (partial(dit_forward, compiled=True), (">=", 0.50), "the same, blocks compiled"),
    "lap_floor": (lap_floor, ("<=", 1.8), f"LAP of {CONDITION_TOKENS} tokens to the floor of its FLOPs"),
    "decode_capture": (decode_capture, (">=", 0.95), "VERIFI's tokens a second to transformers' generate's, 8B"),
    "decode_static": (decode_static, (">=", 2.0), "static cache and compilation to neither"),
}


def _dit_inputs(spec, device: str) -> tuple[torch.Tensor, ...]:
    options = {"device": device, "dtype": torch.float32 if device == "meta" else DTYPE}
    side = SIZE // 16  # latents of a VAE of compression 8 in patches of 2, or of one of 16 without
    latents = torch.zeros(1, spec.in_channels, side * spec.patch_size, side * spec.patch_size, **options)
    return latents, torch.full((1,), 0.5, **options), torch.zeros(1, CONDITION_TOKENS, spec.condition_width, **options)


def _flops(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def _random(module: nn.Module) -> nn.Module:
    module = module.to(DTYPE).to_empty(device=DEVICE).eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.normal_(std=0.02)
    return module


# InternVL3-8B's language model
TEXT = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "layer_types": ["full_attention"] * 28,
    "vocab_size": 151674,
}


def _vlm() -> FrozenVLM:
    """That language model with random weights, behind the micro model's tokenizer."""
    from transformers import AutoConfig, AutoTokenizer, InternVLForConditionalGeneration

    config = AutoConfig.from_pretrained(WEIGHTS, local_files_only=True)
    for name, value in TEXT.items():
        setattr(config.text_config, name, value)
    with torch.device(DEVICE):
        model = InternVLForConditionalGeneration._from_config(config, dtype=DTYPE)
    return InternVL(model, AutoTokenizer.from_pretrained(WEIGHTS, local_files_only=True))


def _generate(vlm: FrozenVLM) -> None:
    prompts = vlm.prepare([Request("a red heart")])
    vlm.model.generate(
        input_ids=prompts.ids,
        attention_mask=prompts.mask.long(),
        max_new_tokens=WORDS + 1,
        min_new_tokens=WORDS + 1,
        do_sample=False,
    )


def _rewrite(vlm: FrozenVLM, static: bool = False) -> None:
    prompts = vlm.prepare([Request("a red heart")])
    vlm.generate(
        prompts, WORDS + 1, after_step=lambda tokens: [False] * len(tokens), **({"static": True} if static else {})
    )


@torch.no_grad()
def _seconds(run: Callable[[], object], repeats: int, warm: int = 2) -> float:
    for _ in range(warm):
        run()
    best = float("inf")
    for _ in range(repeats):
        _wait()
        start = time.perf_counter()
        run()
        _wait()
        best = min(best, time.perf_counter() - start)
    return best


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
