"""One layer of the VLM alone: the usual way, and LAP's first rival.

Letters in shapes: `B` batch, `T` condition tokens, `L` tapped layers, `E` VLM width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ..layers import check_states


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """Which of the tapped layers speaks: index -1 is the last, -2 the one before (the paper's penultimate)."""

    num_layers: int
    width: int
    index: int = -1
    kind: Literal["layer"] = "layer"

    def __post_init__(self) -> None:
        if not -self.num_layers <= self.index < self.num_layers:
            raise ValueError(f"index {self.index}: expected -{self.num_layers} to {self.num_layers - 1}")

    @property
    def slots(self) -> int:
        return 1


class SingleLayer(nn.Module):
    """Pass one tapped layer on as it is; the DiT's own projection normalises it (UniFusion, Sec. 2.1, Fig. 1a)."""

    def __init__(self, spec: LayerSpec):
        super().__init__()
        self.spec = spec

    def init_weights(self) -> None:
        """There is nothing to train."""

    def forward(self, states: Tensor, drop_layers: Sequence[int] = ()) -> Tensor:
        """Pick from states [B, T, L, E]: [B, T, E]; zero if the layer is among those dropped."""
        check_states(states, self.spec.num_layers, self.spec.width, drop_layers)
        picked = states[:, :, self.spec.index]
        return picked * 0 if self.spec.index % self.spec.num_layers in drop_layers else picked
