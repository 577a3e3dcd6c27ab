"""What is trained, in one module: LAP or a rival, refiner and DiT; a batch in, the loss of every row out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..conditioning.pooling import build_pooling
from ..conditioning.refiner import Refiner
from ..diffusion import flow
from ..diffusion.dit import DiT, DiTBlock
from ..fusion import pool, refine
from ..layers import TransformerBlock
from ..pipeline import load_generator
from ..presets import ModelSpec
from .feed import MicroBatch


@dataclass(frozen=True)
class TakenOver:
    """kept: tensors that came from the file; new: parts that start anew, such as "lap" and "dit.txt_in"."""

    kept: int
    new: tuple[str, ...]


class Trainee(nn.Module):
    """The names of its parts, `lap`, `refiner` and `dit`, are those of a model file.

    compute: dtype of matrix products; weights, norms, the path and the loss stay float32.
    """

    def __init__(self, spec: ModelSpec, compute: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.spec, self.compute = spec, compute
        self.lap = build_pooling(spec.lap)
        self.refiner = Refiner(spec.refiner).requires_grad_(spec.refiner_place != "none")  # unused, it gets no gradient
        self.dit = DiT(spec.dit)

    def init_weights(self) -> None:
        for part in (self.lap, self.refiner, self.dit):
            part.init_weights()

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks of all parts: what is checkpointed and compiled one by one."""
        return [module for module in self.modules() if isinstance(module, (TransformerBlock, DiTBlock))]

    @property
    def units(self) -> list[nn.Module]:
        """What FSDP2 cuts up one by one. LAP is one unit: its blocks run as often as a process has chunks of tokens,
        and processes that gather a different number of times wait for each other forever."""
        units = [self.lap, self.refiner, *self.dit.blocks]
        return [unit for unit in units if next(unit.parameters(), None) is not None]

    def forward(self, batch: MicroBatch) -> Tensor:
        """Mean squared error of the velocity of each row [B], float32."""
        x = flow.x_t(batch.latents, batch.noise, batch.t)
        with torch.autocast(x.device.type, self.compute, enabled=self.compute != torch.float32):
            states = batch.states if self.compute != torch.float32 else batch.states.float()
            tokens = pool(self.spec, self.lap, self.refiner, states, batch.mask)
            tokens = refine(self.spec, self.refiner, tokens, batch.mask)
            velocity = self.dit(x, batch.t, tokens, batch.mask, batch.positions)
        error = velocity.float() - flow.velocity_target(batch.latents, batch.noise)
        return error.square().flatten(1).mean(1)


def build_trainee(spec: ModelSpec, *, init: Path | None, seed: int, compute: torch.dtype) -> Trainee:
    """Fresh weights from the seed, or those of a model file of the same spec."""
    torch.manual_seed(seed)
    if init is None:
        trainee = Trainee(spec, compute)
        trainee.init_weights()
        return trainee
    trainee = empty_trainee(spec, compute=compute)
    _, parts = load_generator(init)
    for name, part in zip(("lap", "refiner", "dit"), parts, strict=True):
        getattr(trainee, name).load_state_dict(part.state_dict(), assign=True)  # a copy would double the memory
    return trainee


def empty_trainee(spec: ModelSpec, *, compute: torch.dtype) -> Trainee:
    """Shapes without memory (the meta device), for weights that another process has (`scaled.shard`)."""
    with torch.device("meta"):
        return Trainee(spec, compute)


def take_over(generator: nn.Module, path: Path) -> TakenOver:
    """Weights of a model file in the parts that both have; a part with anything of another shape stays as it is."""
    theirs = {
        f"{name}.{key}": value
        for name, part in zip(("lap", "refiner", "dit"), load_generator(path)[1], strict=True)
        for key, value in part.state_dict().items()
    }
    mine = generator.state_dict()
    new = {_part(key) for key, value in mine.items() if key not in theirs or theirs[key].shape != value.shape}
    kept = {key: theirs[key] for key in mine if _part(key) not in new}
    generator.load_state_dict({**mine, **kept})
    return TakenOver(len(kept), tuple(dict.fromkeys(_part(key) for key in mine if _part(key) in new)))


def _part(name: str) -> str:
    """Of what a tensor is part: lap, refiner, or a part of the DiT as dit.txt_in."""
    return ".".join(name.split(".")[: 2 if name.startswith("dit.") else 1])


def checkpoint_blocks(blocks: list[nn.Module]) -> None:
    """Computes each block's activations again in the backward pass instead of keeping them."""
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
