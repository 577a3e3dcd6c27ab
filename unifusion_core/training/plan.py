"""What a training will cost before it starts: FLOPs, memory per GPU under FSDP2, disk, days.

Every number is computed from the spec on the meta device; none is measured. The assumptions are the constants below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from math import ceil

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..conditioning.lap import LayerwiseAttentionPooling
from ..conditioning.refiner import Refiner
from ..diffusion.dit import DiT
from ..presets import ModelSpec

PEAK_FLOPS, UTILISATION = 989e12, 0.45  # dense bf16 of an H100 SXM, and the share of it that a training reaches
MASTER_BYTES = 16  # fp32 weight, gradient and Adam's two moments
EMA_BYTES = 4
STATE_BYTES = 16  # on disk: fp32 weight, average and Adam's two moments
COMPUTE_BYTES = 2  # bf16
GATHERED_BLOCKS = 2  # FSDP2 holds the running block whole, and the next one on its way
OVERHEAD = 2e9  # CUDA context, NCCL and the allocator's gaps; bytes
CHANNELS_PER_ACTIVATION = 16  # maps of width D that one block keeps for its own backward: q k v gate out, norms, MLP
VLM_PARAMETERS = {  # InternVL2.5-8B, InternVL3-8B, …
    "unifusion-5b": 8.08e9,
    "unifusion-8b": 7.94e9,
    "unifusion-8b-gemma3-12b": 12.19e9,
    "krea2": 4.44e9,
}
TILE_TOKENS, TEXT_TOKENS = 256, 300


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a training. size: px of a square picture; tiles: of its reference, the thumbnail counted."""

    name: str
    steps: int
    batch: int
    size: int
    tiles: int

    @property
    def tokens(self) -> int:
        return TEXT_TOKENS + self.tiles * TILE_TOKENS


STAGES = (  # 200k steps of 1024 and about 10k of edits are the paper's; sizes, tiles and the middle stage ours
    Stage(name="stage 1: text-to-image, reconstruction, joint", steps=200_000, batch=1024, size=512, tiles=5),
    Stage(name="stage 1 at full size", steps=40_000, batch=512, size=1024, tiles=5),
    Stage(name="stage 2: edits", steps=10_000, batch=256, size=1024, tiles=10),
)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one stage on so many GPUs. Bytes are per GPU, flops and days of the whole stage."""

    stage: str
    gpus: int
    per_gpu_batch: int
    accumulation: int
    flops: float
    days: float
    memory_bytes: float
    fits_80_gb: bool


def parameters(spec: ModelSpec) -> dict[str, int]:
    """Trained parameters by part, from modules on the meta device."""
    return {name: sum(weight.numel() for weight in part.parameters()) for name, part in _parts(spec).items()}


def sample_flops(spec: ModelSpec, stage: Stage, *, checkpointing: bool = True) -> float:
    """FLOPs of one sample's forward and backward: three forwards of what is trained, one more where activations are
    computed again, and one of the frozen VLM."""
    parts, size = _parts(spec), stage.size // 8 // spec.dit.patch_size * spec.dit.patch_size
    meta = {"device": "meta"}
    tokens = torch.empty(1, stage.tokens, spec.dit.condition_width, **meta)
    states = torch.empty(1, stage.tokens, spec.lap.num_layers, spec.lap.width, **meta)
    latents = torch.empty(1, spec.dit.in_channels, size, size, **meta)
    trained = sum(
        (
            count_flops(partial(parts["dit"], latents, torch.zeros(1, **meta), tokens)),
            count_flops(partial(parts["lap"], states)),
            count_flops(partial(parts["refiner"], tokens)),
        )
    )
    frozen = 2 * VLM_PARAMETERS.get(spec.name, 0.0) * stage.tokens
    return trained * (4 if checkpointing else 3) + frozen


def memory(spec: ModelSpec, stage: Stage, gpus: int, per_gpu_batch: int) -> dict[str, float]:
    """Bytes on each GPU: FSDP2 over all of them, bf16 compute, EMA, checkpointing; the frozen VLM is whole on each."""
    counts = parameters(spec)
    trained = sum(counts.values())
    block = sum(weight.numel() for weight in _parts(spec)["dit"].blocks[0].parameters())
    length = stage.tokens + (stage.size // 8 // spec.dit.patch_size) ** 2
    row = per_gpu_batch * length * spec.dit.width * COMPUTE_BYTES
    states = per_gpu_batch * stage.tokens * spec.lap.num_layers * spec.lap.width * COMPUTE_BYTES
    return {
        "weights, gradients, optimizer": trained * MASTER_BYTES / gpus,
        "average of the weights": trained * EMA_BYTES / gpus,
        "blocks gathered": GATHERED_BLOCKS * block * COMPUTE_BYTES if gpus > 1 else 0.0,
        "activations": row * (spec.dit.depth + CHANNELS_PER_ACTIVATION),
        "activations of LAP": states * (spec.lap.depth + CHANNELS_PER_ACTIVATION),
        "states of the VLM": states,
        "frozen VLM": VLM_PARAMETERS.get(spec.name, 0.0) * COMPUTE_BYTES,
        "overhead": OVERHEAD,
    }


def plan(spec: ModelSpec, gpus: Sequence[int] = (1, 8, 64), stages: Sequence[Stage] = STAGES) -> dict:
    """Costs of every stage on every number of GPUs, JSON-able, with the disk that latents and checkpoints take.

    Raises:
        ValueError: a number of GPUs below 1.
    """
    return report_of(
        spec.name,
        parameters(spec),
        {"VLM": VLM_PARAMETERS[spec.name]} if spec.name in VLM_PARAMETERS else {},
        gpus,
        stages,
        partial(memory, spec),
        partial(sample_flops, spec),
        spec.dit.in_channels * 64 * 64,
    )


def report_of(
    name: str,
    trained: Mapping[str, float],
    frozen: Mapping[str, float],
    gpus: Sequence[int],
    stages: Sequence[Stage],
    memory: Callable[[Stage, int, int], dict[str, float]],
    flops: Callable[[Stage], float],
    latents: int,
) -> dict:
    """The plan of any training.

    Args:
        trained, frozen: parameters by part. memory: (stage, gpus, samples on each) → bytes on each, by what they hold.
        flops: of one sample of a stage. latents: numbers that one picture of 512 px takes.
    """
    if bad := [count for count in gpus if count < 1]:
        raise ValueError(f"{bad[0]} GPUs: expected at least 1")
    weights = sum(trained.values())
    costs = [_cost(stage, count, memory, flops(stage)) for stage in stages for count in gpus]
    return {
        "preset": name,
        "parameters": {**trained, "trained": weights},
        "frozen": dict(frozen),
        "costs": [asdict(cost) for cost in costs],
        "memory": {
            f"{stage.name}, {count} GPUs": memory(stage, count, _share(stage, count, memory))
            for stage in stages
            for count in gpus
        },
        "disk_bytes": {
            "a million cached latents at 512 px": 1e6 * latents * COMPUTE_BYTES,
            "one state to resume from (twice that while it is replaced)": weights * STATE_BYTES,
            "one model file": weights * COMPUTE_BYTES,
        },
        "assumes": {"peak_flops": PEAK_FLOPS, "utilisation": UTILISATION, "text_tokens": TEXT_TOKENS},
    }


def title(report: dict) -> str:
    """One line on what is trained and what stands by."""
    parts = {name: count for name, count in report["parameters"].items() if name != "trained"}
    frozen = "".join(f"; frozen: {name} {count / 1e9:.2f}B" for name, count in report["frozen"].items())
    labels = {"dit": "DiT", "lap": "LAP"}
    counted = ", ".join(f"{labels.get(name, name)} {count / 1e9:.2f}B" for name, count in parts.items())
    return f"{report['preset']}: {report['parameters']['trained'] / 1e9:.2f}B trained ({counted}){frozen}"


def markdown(report: dict) -> str:
    """The plan as a table for a page."""
    lines = [f"{title(report)}.", "", "| stage | GPUs | batch of each × accumulation | ZFLOP | days | GB on each |"]
    lines += ["|---|---|---|---|---|---|"]
    for row in report["costs"]:
        size = f"{row['memory_bytes'] / 1e9:.0f}" + " (over 80)" * (not row["fits_80_gb"])
        batch = f"{row['per_gpu_batch']} × {row['accumulation']}"
        numbers = f"{row['flops'] / 1e21:.2f} | {row['days']:.1f} | {size}"
        lines.append(f"| {row['stage']} | {row['gpus']} | {batch} | {numbers} |")
    disk = ", ".join(f"{what} {_gigabytes(size)}" for what, size in report["disk_bytes"].items())
    return "\n".join([*lines, "", f"On disk: {disk}."])


def table(report: dict) -> str:
    """The plan as lines for people."""
    lines = [
        f"{title(report)}; computed, not measured",
        f"{'stage':46}{'GPUs':>5}{'batch':>7}{'accum.':>7}{'ZFLOP':>9}{'days':>9}{'GB each':>9}",
    ]
    for row in report["costs"]:
        note = "" if row["fits_80_gb"] else "  over 80 GB"
        lines.append(
            f"{row['stage']:46}{row['gpus']:5}{row['per_gpu_batch']:7}{row['accumulation']:7}{row['flops'] / 1e21:9.1f}"
            f"{row['days']:9.1f}{row['memory_bytes'] / 1e9:9.1f}{note}"
        )
    lines += [f"{what}: {_gigabytes(size)}" for what, size in report["disk_bytes"].items()]
    return "\n".join(lines)


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.0f} GB" if size >= 1e10 else f"{size / 1e9:.1f} GB"


def _cost(stage: Stage, gpus: int, memory: Callable, sample_flops: float) -> Cost:
    share = _share(stage, gpus, memory)
    flops = sample_flops * stage.batch * stage.steps
    needed = sum(memory(stage, gpus, share).values())
    return Cost(
        stage=stage.name,
        gpus=gpus,
        per_gpu_batch=share,
        accumulation=ceil(stage.batch / (gpus * share)),
        flops=flops,
        days=flops / (PEAK_FLOPS * UTILISATION * gpus) / 86400,
        memory_bytes=needed,
        fits_80_gb=needed <= 80e9,
    )


def _share(stage: Stage, gpus: int, memory: Callable) -> int:
    """The largest power of two of samples that fits 80 GB beside the rest, at least one, at most an even share."""
    most, share = max(1, stage.batch // gpus), 1
    while share * 2 <= most and sum(memory(stage, gpus, share * 2).values()) <= 80e9:
        share *= 2
    return share


@cache
def _parts(spec: ModelSpec) -> dict[str, nn.Module]:
    with torch.device("meta"):
        return {"dit": DiT(spec.dit), "lap": LayerwiseAttentionPooling(spec.lap), "refiner": Refiner(spec.refiner)}


@torch.no_grad()
def count_flops(run: Callable) -> int:
    """Of one call on the meta device."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
