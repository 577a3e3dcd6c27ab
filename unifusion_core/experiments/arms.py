"""One arm of an experiment: a small model that differs from the others in one thing, trained for the same compute.

All arms share a frozen VLM (or T5) and VAE. A finished arm is a file and one that was cut off keeps its state, so that
a run can be stopped at any time and goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from hashlib import sha256
from json import dumps
from pathlib import Path
from shutil import rmtree
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..conditioning.lap import LAPSpec
from ..diffusion.dit import DiTSpec
from ..files import save_json
from ..pipeline import UniFusion, load_generator, save_generator
from ..presets import ModelSpec, micro
from ..training.loop import LoopSpec, fit
from ..training.micro_dit import Frozen, Generator, Trainee, loss
from ..training.trainee import take_over
from .data import BATCH, NOISES, Mix, batch
from .encoders import TextTeacher, text_encoder, text_folder, text_loop, untrained_text_encoder, vae, vlm

STEPS = 400  # of the reference arm on prompts; the others take as many as cost the same
LOOP = LoopSpec(
    steps=STEPS,
    batch_size=BATCH,
    rate=3e-3,
    muon_rate=1e-2,
    warmup=30,
    decay_fraction=0.6,
    ema_decay=0.99,
    save_minutes=3,
)
VERSION = 1  # raise it where training changes, so that older arms are trained anew
COUNTED = 2  # batches whose work is counted for the cost of a step

Report = Callable[[int, int], None]
"""report(steps done, of all)"""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What is trained: sizes, data, where it starts and for how long.

    encoder: whose states its layers are of. data: what a batch consists of. start: an arm whose weights and data it
    goes on from. share: of the compute that every arm without a start has; steps follow from it. fades: the rate falls
    to zero towards the end.
    """

    name: str
    spec: ModelSpec
    data: Mix = (("prompt", 1.0),)
    encoder: Literal["vlm", "t5"] = "vlm"
    start: Arm | None = None
    share: float = 1.0
    fades: bool = True

    @property
    def whole_share(self) -> float:
        """With that of the arm it starts from."""
        return self.share + (self.start.whole_share if self.start else 0.0)

    @property
    def needs_text_encoder(self) -> bool:
        return self.encoder == "t5" or bool(self.start and self.start.needs_text_encoder)

    def key(self, seed: int, steps: int) -> str:
        """The name of its file; changes with everything that decides the weights."""
        parts = {"arm": asdict(self), "seed": seed, "steps": steps, "loop": asdict(LOOP)}
        parts |= {"batch": BATCH, "noises": NOISES, "version": VERSION}
        if self.needs_text_encoder:
            parts["t5"] = text_folder(Path(), text_loop(steps / STEPS)).name
        return f"{self.name}-{seed}-{sha256(dumps(parts, sort_keys=True).encode()).hexdigest()[:8]}"


def reference() -> ModelSpec:
    """LAP over every third layer, a refiner after it, and a DiT half as deep as the micro model's."""
    base = micro()
    width = base.lap.width
    return replace(
        base,
        name="arm",
        lap=LAPSpec(num_layers=len(base.layers), width=width, num_heads=4, intermediate_size=192),
        refiner=replace(base.refiner, intermediate_size=192),
        dit=DiTSpec(
            in_channels=8,
            patch_size=2,
            depth=4,
            num_heads=4,
            head_dim=32,
            intermediate_size=384,
            timestep_dim=128,
            condition_width=width,
            axes_dim=(8, 12, 12),
            image_positions="source",
        ),
    )


def train(arm: Arm, seed: int, folder: Path, *, steps: int = STEPS, report: Report | None = None) -> Path:
    """Trains an arm, and what it starts from, unless its file is there; returns that.

    Args:
        folder: of the run; its T5 must be there where the arm needs one (`encoders.train_text_encoder`).
        steps: the reference arm's; this one takes as many as cost the same (`fair_steps`).
    """
    path = weights(arm, seed, folder, steps)
    if path.is_file():
        return path
    torch.manual_seed(seed)
    generator = Generator(arm.spec)
    generator.init_weights()
    first, taken = 0, fair_steps(arm, steps)
    if arm.start is not None:
        take_over(generator, train(arm.start, seed, folder, steps=steps, report=report))
        first = fair_steps(arm.start, steps)
    began, done = time.process_time(), []

    def make(step: int, seed: int, _: tuple[int, int]) -> Any:
        done.append(step)
        if report:
            report(step, taken)
        return batch(arm.data, seed, first + step)

    run = folder / "runs" / path.stem
    spec = replace(LOOP, seed=seed, steps=taken, decay_fraction=LOOP.decay_fraction if arm.fades else 0.0)
    fit(Trainee(generator, teacher(arm, folder, steps)), loss, make, spec, run, device="cpu")
    record = {"steps": taken, "gflops": taken * step_flops(arm) / 1e9}
    if done:
        record["cpu_seconds"] = round((time.process_time() - began) * taken / len(done), 1)
    save_json(path.with_suffix(".json"), record)
    save_generator(path, replace(arm.spec, vlm=encoder_of(arm, folder, steps).identity), generator)
    rmtree(run)
    return path


def load(arm: Arm, seed: int, folder: Path, *, steps: int = STEPS) -> UniFusion:
    """Opens a trained arm as a whole model.

    Raises:
        ValueError: it has not been trained, or on another VLM or T5.
    """
    spec, parts = load_generator(weights(arm, seed, folder, steps))
    return UniFusion(spec, encoder_of(arm, folder, steps).tapping(spec.layers), *parts, vae())


def weights(arm: Arm, seed: int, folder: Path, steps: int) -> Path:
    return folder / "arms" / f"{arm.key(seed, steps)}.safetensors"


def encoder_of(arm: Arm, folder: Path, steps: int):
    """The frozen VLM, or the run's own T5."""
    return vlm() if arm.encoder == "vlm" else text_encoder(text_folder(folder, text_loop(steps / STEPS)))


def teacher(arm: Arm, folder: Path, steps: int) -> Frozen:
    encoder = encoder_of(arm, folder, steps)
    if arm.encoder == "t5":
        return TextTeacher(encoder, vae())
    return Frozen(encoder.model, encoder.tokenizer, vae(), arm.spec.layers)


# Equal compute.


def fair_steps(arm: Arm, steps: int) -> int:
    """How many steps cost the arm's share of what `steps` of the reference arm on prompts cost, in FLOPs."""
    return max(1, round(arm.share * steps * step_flops(Arm(name="reference", spec=reference())) / step_flops(arm)))


def step_flops(arm: Arm) -> int:
    """FLOPs of one training step, forward and backward, with the frozen encoder and VAE."""
    return _step_flops(arm.spec, arm.data, arm.encoder)


@cache
def _step_flops(spec: ModelSpec, data: Mix, encoder: str) -> int:
    if encoder == "t5":
        frozen: Frozen = TextTeacher(untrained_text_encoder(), vae())
    else:
        frozen = Frozen(vlm().model, vlm().tokenizer, vae(), spec.layers)
    trainee = Trainee(Generator(spec), frozen)
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        for step in range(COUNTED):
            trainee(batch(data, 0, step))["loss"].backward()
    return counter.get_total_flops() // COUNTED


def _attention(query, key, value, *_, **__) -> int:
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (width + value[3])


_CPU_ATTENTION = {  # which PyTorch does not count by itself
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda _, *rest, **named: (
        _attention(*rest, **named) * 5 // 2
    ),
}
