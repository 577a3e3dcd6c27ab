"""One training loop for every recipe: a batch from (seed, step), a loss, a step; resumable to the exact step.

The data are a pure function of the seed and the step, so that resuming needs no reader state.
"""

from __future__ import annotations

import atexit
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from torch import Tensor, nn
from tqdm.auto import tqdm

from .ema import EMA
from .muon import BatchedMuon

Metrics = dict[str, Tensor | float]


@dataclass(frozen=True, kw_only=True)
class LoopSpec:
    """How long, how fast, how often. Rates are AdamW's; matrices take `muon_rate` through Muon where it is set."""

    steps: int
    batch_size: int
    rate: float = 1e-3
    muon_rate: float | None = None
    weight_decay: float = 0.01
    warmup: int = 100
    decay_fraction: float = 0.3  # the share of the steps, at the end, over which the rate falls linearly to zero
    clip: float = 1.0
    ema_decay: float | None = None
    seed: int = 0
    save_minutes: float = 5.0
    compile: bool = False  # the recipe compiles its blocks: 20 % faster on a CPU after a minute; needs a C++ compiler
    log_every: int = 50

    def rate_factor(self, step: int) -> float:
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        fall = (self.steps - step) / max(1.0, self.decay_fraction * self.steps)
        return max(0.0, min(rise, fall, 1.0))


def joined(device: str | None, **settings) -> Accelerator:
    """An Accelerator whose process group is left at exit, where gloo's threads would else abort a finished process."""
    accelerator = Accelerator(cpu=device == "cpu", **settings)
    atexit.unregister(_leave)
    atexit.register(_leave)
    return accelerator


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def fit(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], tuple[Tensor, Metrics]],
    batch: Callable[[int, int, tuple[int, int]], Any],
    spec: LoopSpec,
    folder: Path,
    *,
    device: str | None = None,
) -> nn.Module:
    """Trains `model` in place, on a GPU where there is one, and leaves the averaged weights in it, on the CPU.

    Args:
        loss: (model, batch) → scalar loss and what to log.
        batch: (step, seed, (process, processes)) → this process's share of one batch; called once a step.
        folder: where `state/` (for resuming) and `log.jsonl` go. If it holds a state, training goes on from there.
    """
    set_seed(spec.seed)
    # accelerate would step a schedule once per process, and so run it out too early.
    accelerator = joined(device, step_scheduler_with_optimizer=False)
    optimizers = build_optimizers(model, spec)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, spec.rate_factor) for optimizer in optimizers]
    progress = _Progress()
    shard = accelerator.process_index, accelerator.num_processes
    prepared, *rest = accelerator.prepare(model, *optimizers, *schedulers)
    ema = EMA(accelerator.unwrap_model(prepared), spec.ema_decay) if spec.ema_decay else None
    optimizers, schedulers = rest[: len(optimizers)], rest[len(optimizers) :]
    accelerator.register_for_checkpointing(progress, *([ema] if ema else []))
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / "state"
    if state.is_dir():
        accelerator.load_state(str(state))
    saved = time.monotonic()
    bar = tqdm(total=spec.steps, initial=progress.step, desc=folder.name, disable=not accelerator.is_main_process)
    window: dict[str, list[float]] = {}
    prepared.train()
    while progress.step < spec.steps:
        value, metrics = loss(prepared, send_to_device(batch(progress.step, spec.seed, shard), accelerator.device))
        if not torch.isfinite(value):
            raise ValueError(f"the loss of step {progress.step} is {value.item()}; resume with a lower rate")
        accelerator.backward(value)
        if spec.clip:
            accelerator.clip_grad_norm_(prepared.parameters(), spec.clip)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if ema:
            ema.update(accelerator.unwrap_model(prepared))
        progress.step += 1
        bar.update()
        for key, number in {"loss": value, **metrics}.items():
            window.setdefault(key, []).append(float(number.detach() if isinstance(number, Tensor) else number))
        if progress.step % spec.log_every == 0 or progress.step == spec.steps:
            _log(folder, accelerator, progress.step, {k: sum(v) / len(v) for k, v in window.items()}, bar)
            window.clear()
        if time.monotonic() - saved > spec.save_minutes * 60:
            _save(accelerator, state)
            saved = time.monotonic()
    bar.close()
    _save(accelerator, state)
    if ema:
        ema.copy_to(model)
    return model.cpu().eval()


def build_optimizers(model: nn.Module, spec: LoopSpec) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the network where `muon_rate` is set, AdamW for all else."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        inner = parameter.ndim == 2 and not any(word in name for word in ("embed", "head", "table", "final", "_in."))
        (matrices if spec.muon_rate and inner else others).append(parameter)
    optimizers: list[torch.optim.Optimizer] = []
    if others:
        optimizers.append(torch.optim.AdamW(others, lr=spec.rate, betas=(0.9, 0.98), weight_decay=spec.weight_decay))
    if matrices:
        optimizers.append(BatchedMuon(matrices, lr=spec.muon_rate, weight_decay=spec.weight_decay))
    return optimizers


class _Progress:
    step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def _save(accelerator: Accelerator, state: Path) -> None:
    """Writes the state beside and swaps it in, so that a kill leaves the old one or the new one."""
    fresh, old = state.with_name("state.new"), state.with_name("state.old")
    accelerator.save_state(str(fresh))
    accelerator.wait_for_everyone()  # each process adds a file of its own
    if accelerator.is_main_process:
        if state.exists():
            os.replace(state, old)
        os.replace(fresh, state)
        for path in sorted(old.rglob("*"), reverse=True) if old.exists() else []:
            path.rmdir() if path.is_dir() else path.unlink()
        if old.exists():
            old.rmdir()
    accelerator.wait_for_everyone()


def _log(folder: Path, accelerator: Accelerator, step: int, metrics: dict[str, float], bar: tqdm) -> None:
    if not accelerator.is_main_process:
        return
    bar.set_postfix({key: f"{number:.4g}" for key, number in metrics.items()})
    with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "time": time.time(), **metrics}) + "\n")
