"""What training a LAP before a frozen DiT will cost: as `plan.py`, by the sizes of the public hosts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch

from ..conditioning.adapter import LAPAdapter, adapter_spec
from ..conditioning.profiles import PROFILES
from .plan import (
    CHANNELS_PER_ACTIVATION,
    COMPUTE_BYTES,
    EMA_BYTES,
    MASTER_BYTES,
    OVERHEAD,
    Stage,
    count_flops,
    report_of,
)


@dataclass(frozen=True, kw_only=True)
class Host:
    """A frozen DiT and its VLM. channels: of its latents at an eighth of the picture's sides."""

    parameters: float
    width: int
    depth: int
    channels: int
    vlm_parameters: float
    vlm_layers: int


# Z-Image and Klein as diffusers' classes count them, Boogu as its authors say; VLMs by their names' own counts.
_QWEN3_4B = {"vlm_parameters": 4.02e9, "vlm_layers": 36}
_QWEN3_8B = {"vlm_parameters": 8.19e9, "vlm_layers": 36}
HOSTS = {
    "boogu": Host(parameters=10e9, width=3360, depth=40, channels=16, **{**_QWEN3_8B, "vlm_parameters": 8.77e9}),
    "klein-4b": Host(parameters=3.88e9, width=3072, depth=25, channels=32, **_QWEN3_4B),
    "klein-9b": Host(parameters=9.08e9, width=4096, depth=32, channels=32, **_QWEN3_8B),
    "z-image": Host(parameters=6.15e9, width=3840, depth=34, channels=16, **_QWEN3_4B),
}
HOSTS["boogu-edit"] = HOSTS["boogu"]


def plan_adapter(profile: str, gpus: Sequence[int] = (1, 8, 64), stages: Sequence[Stage] | None = None) -> dict:
    """As `plan.plan`, for `unifusion train adapter`. stages: None = `stage_of` the host.

    Raises:
        ValueError: an unknown host, or a number of GPUs below 1.
    """
    if profile not in HOSTS:
        raise ValueError(f"{profile!r}: the sizes of {', '.join(HOSTS)} are known")
    host = HOSTS[profile]
    return report_of(
        profile,
        {"LAP": trained(profile)},
        {"DiT": host.parameters, "VLM": host.vlm_parameters},
        gpus,
        stages or (stage_of(profile),),
        partial(memory, profile),
        partial(sample_flops, profile),
        host.channels * 64 * 64,
    )


def stage_of(profile: str) -> Stage:
    """Ours, for nobody has published one. A batch is as long as its rows with a picture, which most batches have."""
    tiles = int(PROFILES[profile].images != "none")
    return Stage(name="adapter", steps=20_000, batch=256, size=512, tiles=tiles)


def trained(profile: str) -> int:
    return sum(weight.numel() for weight in _adapter(profile).parameters())


def num_layers(profile: str) -> int:
    return _adapter(profile).spec.lap.num_layers


def sample_flops(profile: str, stage: Stage) -> float:
    """FLOPs of one sample: the frozen DiT forward, again where activations are computed anew, and back to its tokens,
    which costs one forward more; LAP four forwards; the VLM one. Attention over the sequence is left out of the DiT."""
    host, width = HOSTS[profile], PROFILES[profile].width
    states = torch.empty(1, stage.tokens, num_layers(profile), width, device="meta")
    length = stage.tokens + (stage.size // 16) ** 2
    lap = count_flops(partial(_adapter(profile), states))
    return 3 * 2 * host.parameters * length + 4 * lap + 2 * host.vlm_parameters * stage.tokens


def memory(profile: str, stage: Stage, gpus: int, per_gpu_batch: int) -> dict[str, float]:
    """Bytes on each GPU; the frozen DiT and VLM are whole on each."""
    host, spec = HOSTS[profile], _adapter(profile).spec
    row = per_gpu_batch * (stage.tokens + (stage.size // 16) ** 2) * host.width * COMPUTE_BYTES
    states = per_gpu_batch * stage.tokens * spec.lap.num_layers * spec.lap.width * COMPUTE_BYTES
    slots = len(spec.host.layers)
    return {
        "weights, gradients, optimizer": trained(profile) * MASTER_BYTES / gpus,
        "average of the weights": trained(profile) * EMA_BYTES / gpus,
        "activations": row * (host.depth + CHANNELS_PER_ACTIVATION),
        "activations of LAP": states * slots * (spec.lap.depth + CHANNELS_PER_ACTIVATION),
        "states of the VLM": states,
        "frozen DiT": host.parameters * COMPUTE_BYTES,
        "frozen VLM": host.vlm_parameters * COMPUTE_BYTES,
        "overhead": OVERHEAD,
    }


@cache
def _adapter(profile: str) -> LAPAdapter:
    host = HOSTS[profile]
    with torch.device("meta"):
        return LAPAdapter(adapter_spec(profile, host.vlm_layers, PROFILES[profile].width))
