"""What every training on the user's own pictures shares: settings, what a resumed run must agree with, words."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..conditioning.vlm import FrozenVLM, T5TextEncoder
from .asked import STAGE1_MIX, PromptTeacher, Teacher
from .buckets import Order, bucket_sizes
from .ema import EMA
from .feed import Feed
from .kept_states import KeptStates, vlm_digest
from .latents import LatentCache, vae_digest
from .loop import LoopSpec
from .samples import Index
from .scaled import fit_scaled

LOOP = LoopSpec(steps=1000, batch_size=32, rate=1e-4, warmup=100, decay_fraction=0.1, ema_decay=0.9999)
SETTINGS = "run.json"
KEPT = ("steps", "batch_size", "rate", "warmup", "decay_fraction", "clip", "ema_decay", "weight_decay", "seed")
DECIDING = ("size", "tiles", "most_tokens", "mix", "dropout", "accumulation", "precision")
ShiftAt = Callable[[tuple[int, int]], float]
"""Latent size (h, w) → shift of the training times."""
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class BaseRun:
    """What decides the losses is kept in `out/run.json`, and a resumed run must agree with it.

    data: folders and tar files (`samples.py`). size: px, of the square bucket. tiles: of a picture, drawn in turn.
    mix: shares of text, picture and joint. dropout: share of conditions that become the empty one. weights: dtype of
    the file.
    """

    out: Path
    data: tuple[Path, ...]
    size: int = 512
    tiles: tuple[int, ...] = (4, 9)
    most_tokens: int = 300
    mix: dict[str, float] = field(default_factory=lambda: dict(STAGE1_MIX))
    dropout: float = 0.1
    most_damaged: float = 0.01
    loop: LoopSpec = LOOP
    accumulation: int = 1
    fsdp: bool = False
    checkpointing: bool = False
    precision: str = "auto"
    weights: str = "bfloat16"
    save_every: int = 500
    cache: Path | None = None
    cache_latents: bool = True
    device: str | None = None
    workers: int = 4
    quiet: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout {self.dropout}: expected a share from 0 to below 1")

    def settings(self, found: Mapping[str, Any] = NOTHING) -> dict:
        """What decides the losses, JSON-able. found: what only loading tells, as `found_in`."""
        loop = {name: getattr(self.loop, name) for name in KEPT}
        own = {name: getattr(self, name) for name in DECIDING} | self.own_settings()
        return json.loads(json.dumps({**own, "data": [str(path) for path in self.data], **loop, **found}))

    def own_settings(self) -> dict:
        """What decides the losses of this kind of training alone."""
        return {}

    def check_resumed(self, found: Mapping[str, Any] = NOTHING) -> None:
        """Raises ValueError where `out` holds a state of other settings, or of other files than those `found`."""
        path, asked = self.out / SETTINGS, self.settings()
        if not path.is_file() or not (self.out / "state").is_dir():
            return
        before = json.loads(path.read_text(encoding="utf-8"))
        for name, now in self.settings(found).items():
            then = before.get(name, now if name in found else None)  # older runs say nothing of what was found
            if now != "auto" and then not in (now, asked.get(name)):
                raise ValueError(
                    f"{self.out} holds a run with {name} {then!r}, not {now!r}; resume it with its own settings and "
                    f"files ({path}), or give another --out"
                )

    def dtype_of_products(self, device: torch.device) -> torch.dtype:
        name = self.precision
        if name == "auto":
            name = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
        if name not in ("bf16", "fp32"):
            raise ValueError(f"--precision {name!r}: expected auto, bf16 or fp32")
        return torch.bfloat16 if name == "bf16" else torch.float32

    def spread(self, processes: int, compute: torch.dtype) -> str:
        """What is cut up, said because a launcher may start fewer processes than it was asked for."""
        how = "FSDP2" if self.fsdp else "a replica in each"
        alone = "one process" + ", in which --fsdp does nothing" * self.fsdp
        spread = alone if processes == 1 else f"{processes} processes, {how}"
        return f"{spread}; {str(compute).removeprefix('torch.')} products"

    @property
    def cache_folder(self) -> Path:
        return self.cache or self.out / "cache"

    def order(self, index: Index, multiple: int) -> Order:
        """The samples in buckets whose sides divide by `multiple` px."""
        sizes = [sample.size for sample in index.samples]
        return Order(sizes, bucket_sizes(self.size, multiple), self.loop.batch_size, self.loop.seed)

    def feed(
        self,
        index: Index,
        order: Order,
        teacher: Teacher | PromptTeacher | KeptStates,
        vae: nn.Module,
        shift_at: ShiftAt,
    ) -> Feed:
        return Feed(
            index,
            order,
            teacher,
            LatentCache(vae, self.cache_folder / "latents" if self.cache_latents else None),
            seed=self.loop.seed,
            mix=self.mix,
            dropout=self.dropout,
            shift_at=shift_at,
            most_damaged=self.most_damaged,
            report=self.out / "damaged.jsonl",
            workers=self.workers,
        )

    def fit(
        self, trainee: nn.Module, feed: Feed, accelerator: Accelerator, compute: torch.dtype
    ) -> tuple[nn.Module, EMA | None]:
        """Trains a module that names its `units`; returns it and the average of its weights."""
        return fit_scaled(
            trainee,
            trainee.units,
            feed,
            self.loop,
            self.out,
            accelerator,
            accumulation=self.accumulation,
            fsdp=self.fsdp,
            compute=compute,
            save_every=self.save_every,
            quiet=self.quiet,
        )


def found_in(vlm: FrozenVLM | T5TextEncoder, vae: nn.Module, compute: torch.dtype) -> dict[str, Any]:
    """What decides the losses beside the settings: weights, by their digests, and the precision that "auto" meant."""
    return {
        "precision": "bf16" if compute == torch.bfloat16 else "fp32",
        "vlm": f"{vlm.identity}, weights {vlm_digest(vlm)}",
        "vae": f"{type(vae).__name__}, weights {vae_digest(vae)}",
    }


def check_mix(mix: Mapping[str, float]) -> None:
    if set(mix) != set(STAGE1_MIX) or min(mix.values()) < 0 or not sum(mix.values()):
        raise ValueError(f"mix {mix}: expected shares of {', '.join(STAGE1_MIX)}, not all zero")


def describe(index: Index, order: Order, trainee: nn.Module) -> str:
    """One line on what is trained on what."""
    edits = sum(sample.is_edit for sample in index.samples)
    counts = ", ".join(f"{w}x{h}: {len(members)}" for (w, h), members in order.members.items())
    size = sum(parameter.numel() for parameter in trainee.parameters())
    return (
        f"{size / 1e6:,.1f}M parameters; {len(index.samples)} samples, {edits} of them edits, {len(index.damaged)} "
        f"damaged; {order.steps_per_epoch} steps an epoch; {counts}"
    )


def report_damaged(index: Index, path: Path) -> None:
    """Names what the list of samples left out; a resumed run has done so before."""
    if index.damaged and not path.exists():
        lines = (json.dumps({"sample": name, "reason": reason}) for name, reason in index.damaged.items())
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
