"""LAP and refiner of one model in one hand: hidden states of its VLM → condition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .condition import Condition
from .conditioning.hidden_states import HiddenStates
from .conditioning.lap import LayerwiseAttentionPooling
from .conditioning.refiner import Refiner
from .presets import ModelSpec


@dataclass(frozen=True, eq=False)
class FusionHead:
    """The trained fusion head of a model.

    drop_layers: positions on the axis of tapped layers whose pooling weight counts as zero (`lap.py`).
    """

    spec: ModelSpec
    lap: LayerwiseAttentionPooling
    refiner: Refiner
    drop_layers: tuple[int, ...] = ()

    @torch.no_grad()
    def pool(self, hidden: HiddenStates) -> HiddenStates:
        """LAP: states [B, T, L, E] → [B, T, 1, E], spans and positions kept.

        Raises:
            ValueError: the states come from another VLM or other layers than the head was trained on.
        """
        check_vlm(self.spec, hidden.vlm, hidden.layers)
        like = next(self.lap.parameters())
        hidden = hidden.to(like.device, like.dtype)
        if self.spec.refiner_place == "before":
            states = hidden.states.movedim(2, 1).flatten(0, 1)
            mask = hidden.mask.repeat_interleave(hidden.states.shape[2], 0)
            states = self.refiner(states, mask).unflatten(0, (len(hidden.mask), -1)).movedim(1, 2)
            hidden = replace(hidden, states=states)
        return replace(hidden, states=self.lap(hidden.states, drop_layers=self.drop_layers)[:, :, None])

    @torch.no_grad()
    def refine(self, pooled: HiddenStates) -> Condition:
        """The refiner over one sequence of pooled tokens → what enters the DiT."""
        mask = None if bool(pooled.mask.all()) else pooled.mask
        tokens = pooled.states.squeeze(2)
        if self.spec.refiner_place == "after":
            tokens = self.refiner(tokens, mask)
        return Condition(tokens, mask, pooled.positions if bool(pooled.positions.any()) else None)


def check_vlm(spec: ModelSpec, identity: str, layers: Sequence[int]) -> None:
    """Raises ValueError unless hidden states come from the VLM and the layers that the model was trained on."""
    if spec.vlm is not None and identity != spec.vlm:
        raise ValueError(
            f"model {spec.name!r} was trained on the VLM {spec.vlm}, but these states come from {identity}; load the "
            "VLM that belongs to the model"
        )
    if tuple(layers) != spec.layers:
        raise ValueError(f"model {spec.name!r} pools layers {spec.layers}, but layers {tuple(layers)} were tapped")
