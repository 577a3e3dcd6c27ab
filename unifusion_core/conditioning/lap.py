"""Layerwise attention pooling: the states of L layers of a frozen VLM, token by token, become one vector each.

Letters in shapes: `B` batch, `T` condition tokens, `L` tapped layers, `E` VLM width, `M` tokens of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..layers import Attention, TransformerBlock, check_states, init_linears, sdpa

MAX_CHUNK_SIZE = 32768  # CUDA's fused attention kernels fail at 65,536 rows (pytorch #142228)


@dataclass(frozen=True, kw_only=True)
class LAPSpec:
    """Sizes of a LayerwiseAttentionPooling; `num_kv_heads=None` means as many as `num_heads`."""

    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int | None = None
    intermediate_size: int
    depth: int = 2
    eps: float = 1e-5
    kind: Literal["lap"] = "lap"

    @property
    def slots(self) -> int:
        """Vectors per token."""
        return 1


class LayerwiseAttentionPooling(nn.Module):
    """Pool the tapped layers of every token: attention blocks across the layer axis, then a linear L -> 1.

    UniFusion, Sec. 4. Tokens do not see each other here, so they may be pooled in chunks of any size.
    """

    def __init__(self, spec: LAPSpec, operations=nn, attention: Attention = sdpa):
        super().__init__()
        self.spec = spec
        self.blocks = nn.ModuleList(
            TransformerBlock(
                spec.width, spec.num_heads, spec.num_kv_heads, spec.intermediate_size, spec.eps, operations, attention
            )
            for _ in range(spec.depth)
        )
        self.projector = operations.Linear(spec.num_layers, 1, bias=False)

    def init_weights(self) -> None:
        """Start training from scratch with the mean over layers."""
        init_linears(self)
        nn.init.constant_(self.projector.weight, 1 / self.spec.num_layers)

    def forward(self, states: Tensor, chunk_size: int | None = None, drop_layers: Sequence[int] = ()) -> Tensor:
        """Pool states [B, T, L, E] to tokens [B, T, E].

        chunk_size: the most tokens pooled at a time; bounds the memory. None: as many as the kernels take. The result
        is the same: to the bit on a CPU, save for chunks of one or two tokens, where BLAS rounds differently.
        drop_layers: indices into the L axis whose pooling weight counts as zero; they still take part in attention.
        Raises ValueError if L or E is not the spec's, or an index or the chunk size is out of range.
        """
        spec = self.spec
        check_states(states, spec.num_layers, spec.width, drop_layers)
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")

        keep = None
        if drop_layers:
            keep = states.new_tensor([layer not in drop_layers for layer in range(spec.num_layers)])
        num_tokens = states.shape[0] * states.shape[1]
        num_chunks = math.ceil(num_tokens / min(chunk_size or MAX_CHUNK_SIZE, MAX_CHUNK_SIZE))
        chunks = states.flatten(0, 1).tensor_split(max(num_chunks, 1))  # each [M, L, E]; even, so no tiny one is left
        return torch.cat([self._pool(chunk, keep) for chunk in chunks]).unflatten(0, states.shape[:2])

    def _pool(self, x: Tensor, keep: Tensor | None) -> Tensor:
        for block in self.blocks:
            x = block(x)
        x = x.transpose(1, 2)  # [M, E, L]
        return self.projector(x if keep is None else x * keep).squeeze(-1)
