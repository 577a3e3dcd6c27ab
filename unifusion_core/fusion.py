"""LAP and refiner of one model in one hand: hidden states of its VLM → condition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .condition import Condition
from .conditioning.hidden_states import HiddenStates
from .conditioning.refiner import Refiner
from .presets import ModelSpec


@dataclass(frozen=True, eq=False)
class FusionHead:
    """The trained fusion head of a model.

    drop_layers: positions on the axis of tapped layers whose pooling weight counts as zero (`lap.py`).
    """

    spec: ModelSpec
    lap: nn.Module
    refiner: Refiner
    drop_layers: tuple[int, ...] = ()

    @torch.no_grad()
    def pool(self, hidden: HiddenStates) -> HiddenStates:
        """LAP, or its rival: states [B, T, L, E] → [B, T, 1, slots E], spans and positions kept.

        Layers that were tapped for others are left aside.

        Raises:
            ValueError: the states come from another VLM than the head was trained on, or lack layers of it.
        """
        if set(self.spec.layers) < set(hidden.layers):
            hidden = hidden.tapping(self.spec.layers)
        check_vlm(self.spec, hidden.vlm, hidden.layers)
        like = next(parameter for parameter in self.refiner.parameters() if parameter.ndim > 1)  # norms may be wider
        hidden = hidden.to(like.device, like.dtype)
        pooled = pool(self.spec, self.lap, self.refiner, hidden.states, hidden.mask, self.drop_layers)
        return replace(hidden, states=pooled[:, :, None])

    @torch.no_grad()
    def refine(self, pooled: HiddenStates) -> Condition:
        """The refiner over one sequence of pooled tokens → what enters the DiT."""
        mask = None if bool(pooled.mask.all()) else pooled.mask
        tokens = refine(self.spec, self.refiner, pooled.states.squeeze(2), mask)
        return Condition(tokens, mask, pooled.positions if bool(pooled.positions.any()) else None)


def pool(
    spec: ModelSpec,
    lap: nn.Module,
    refiner: nn.Module,
    states: Tensor,
    mask: Tensor | None,
    drop_layers: Sequence[int] = (),
) -> Tensor:
    """States [B, T, L, E] → pooled tokens [B, T, slots E], with gradients; a refiner placed before works in here."""
    if spec.refiner_place == "before":
        layers = states.movedim(2, 1).flatten(0, 1)  # each layer is a sequence of its own
        masks = None if mask is None else mask.repeat_interleave(states.shape[2], 0)
        states = refiner(layers, masks).unflatten(0, (len(states), -1)).movedim(1, 2)
    return lap(states, drop_layers=drop_layers).flatten(2)


def refine(spec: ModelSpec, refiner: nn.Module, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Pooled tokens [B, T, slots E] → what enters the DiT, of the same shape, with gradients."""
    if spec.refiner_place != "after":
        return tokens
    slots = spec.lap.slots
    alone = tokens.unflatten(-1, (slots, -1)).movedim(2, 1).flatten(0, 1)  # each slot is a sequence of its own
    masks = None if mask is None else mask.repeat_interleave(slots, 0)
    return refiner(alone, masks).unflatten(0, (-1, slots)).movedim(1, 2).flatten(2)


def check_vlm(spec: ModelSpec, identity: str, layers: Sequence[int]) -> None:
    """Raises ValueError unless hidden states come from the VLM and the layers that the model was trained on."""
    if spec.vlm is not None and identity != spec.vlm:
        raise ValueError(
            f"model {spec.name!r} was trained on the VLM {spec.vlm}, but these states come from {identity}; load the "
            "VLM that belongs to the model"
        )
    if tuple(layers) != spec.layers:
        raise ValueError(f"model {spec.name!r} pools layers {spec.layers}, but layers {tuple(layers)} were tapped")
