"""Hooks' end of the capture: residual streams of prefill and decoding, side by side in one buffer.

B batch, T tokens, L tapped layers, E VLM width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Taps:
    """Collects [B, length, L, E]; each forward (prefill, then every decoded token) goes on where the last one ended."""

    def __init__(self, num_slots: int, length: int) -> None:
        self.states: Tensor | None = None
        self.filled = [0] * num_slots
        self.length = length

    def before(self, slot: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._write(slot, args[0] if args else kwargs["hidden_states"])

        return hook

    def after(self, slot: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
            self._write(slot, output if isinstance(output, Tensor) else output[0])

        return hook

    def start_with(self, states: Tensor) -> None:
        """Begins with these [B, T, L, E], which an earlier forward left."""
        self.states = states.new_empty(states.shape[0], self.length, *states.shape[2:])
        self.states[:, : states.shape[1]] = states
        self.filled = [states.shape[1]] * len(self.filled)

    def _write(self, slot: int, hidden: Tensor) -> None:
        if self.states is None:
            self.states = hidden.new_empty(hidden.shape[0], self.length, len(self.filled), hidden.shape[-1])
        start = self.filled[slot]
        stop = min(start + hidden.shape[1], self.length)  # on MPS generate runs one step more than it returns
        self.states[:, start:stop, slot] = hidden[:, : stop - start]
        self.filled[slot] = stop


class StaticTaps(Taps):
    """The same for a compiled forward, which would be compiled anew for every number that changes.

    The buffer and the counters are tensors that stay where they are, from run to run.
    """

    def __init__(self, num_slots: int, length: int) -> None:
        super().__init__(num_slots, length)
        self.at: Tensor | None = None  # [L], where each slot goes on

    def restart(self) -> None:
        if self.at is not None:
            self.at.zero_()

    def taken(self) -> Taps:
        """Returns a copy of what this run has written."""
        copied = Taps(len(self.filled), self.length)
        copied.states, copied.filled = self.states.clone(), self.at.tolist()
        return copied

    def _write(self, slot: int, hidden: Tensor) -> None:
        if self.states is None:  # in the prefill, which is never compiled
            super()._write(slot, hidden)
            self.at = torch.zeros(len(self.filled), dtype=torch.long, device=hidden.device)
            for tensor in (self.states, self.at):
                torch._dynamo.mark_static_address(tensor)
        places = self.at[slot] + torch.arange(hidden.shape[1], device=hidden.device)
        self.states[:, :, slot].index_copy_(1, places, hidden)
        self.at[slot].add_(hidden.shape[1])
