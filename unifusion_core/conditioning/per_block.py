"""A vector for every block of the DiT: layers matched to blocks, or a LAP for each.

What the DiT does with them is its own affair (`diffusion.injection`): added to the residual stream (hidden state
injection) or read as keys and values (layerwise key-value fusion).
Letters in shapes: `B` batch, `T` condition tokens, `L` tapped layers, `S` slots (places of injection), `E` VLM width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..layers import Attention, check_states, sdpa
from .lap import LAPSpec, LayerwiseAttentionPooling


@dataclass(frozen=True, kw_only=True)
class MatchedLayersSpec:
    """Slot i takes the tapped layer at the same relative depth, the first slot the first and the last the last."""

    num_layers: int
    width: int
    slots: int
    kind: Literal["matched"] = "matched"

    def __post_init__(self) -> None:
        if self.slots < 2:
            raise ValueError(f"slots {self.slots}: expected at least 2")

    @property
    def indices(self) -> tuple[int, ...]:
        return tuple(round(slot * (self.num_layers - 1) / (self.slots - 1)) for slot in range(self.slots))


@dataclass(frozen=True, kw_only=True)
class LAPPerBlockSpec:
    """A dedicated LAP for every slot."""

    lap: LAPSpec
    slots: int
    kind: Literal["lap-per-block"] = "lap-per-block"

    def __post_init__(self) -> None:
        if isinstance(self.lap, dict):
            object.__setattr__(self, "lap", LAPSpec(**self.lap))
        if self.slots < 2:
            raise ValueError(f"slots {self.slots}: expected at least 2")

    @property
    def num_layers(self) -> int:
        return self.lap.num_layers

    @property
    def width(self) -> int:
        return self.lap.width


class MatchedLayers(nn.Module):
    """Give every block of the DiT the states of its layer of the VLM (UniFusion, Sec. 2.1, Fig. 1b)."""

    def __init__(self, spec: MatchedLayersSpec):
        super().__init__()
        self.spec = spec

    def init_weights(self) -> None:
        """There is nothing to train."""

    def forward(self, states: Tensor, drop_layers: Sequence[int] = ()) -> Tensor:
        """Pick from states [B, T, L, E]: [B, T, S, E]; dropped layers are zero."""
        check_states(states, self.spec.num_layers, self.spec.width, drop_layers)
        picked = states[:, :, list(self.spec.indices)]
        if not drop_layers:
            return picked
        return picked * picked.new_tensor([index not in drop_layers for index in self.spec.indices])[:, None]


class LAPPerBlock(nn.Module):
    """Pool the layers anew for every block of the DiT (UniFusion, App. A.1.1, Fig. 21)."""

    def __init__(self, spec: LAPPerBlockSpec, operations=nn, attention: Attention = sdpa):
        super().__init__()
        self.spec = spec
        self.laps = nn.ModuleList(LayerwiseAttentionPooling(spec.lap, operations, attention) for _ in range(spec.slots))

    def init_weights(self) -> None:
        """Start training from scratch."""
        for lap in self.laps:
            lap.init_weights()

    def forward(self, states: Tensor, drop_layers: Sequence[int] = ()) -> Tensor:
        """Pool states [B, T, L, E] to [B, T, S, E]."""
        return torch.stack([lap(states, drop_layers=drop_layers) for lap in self.laps], dim=2)
