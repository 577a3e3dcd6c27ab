"""The refiner: bidirectional attention over the condition tokens, which a causal VLM has let look back only.

Letters in shapes: `B` batch, `T` condition tokens, `E` VLM width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..layers import Attention, TransformerBlock, check_mask, init_linears, key_mask, sdpa


@dataclass(frozen=True, kw_only=True)
class RefinerSpec:
    """Sizes of a Refiner; `num_kv_heads=None` means as many as `num_heads`."""

    width: int
    num_heads: int
    num_kv_heads: int | None = None
    intermediate_size: int
    depth: int = 2
    eps: float = 1e-5


class Refiner(nn.Module):
    """Let every condition token see all others, before and after it (UniFusion, Sec. 3 and A.1.2)."""

    def __init__(self, spec: RefinerSpec, operations=nn, attention: Attention = sdpa):
        super().__init__()
        self.spec = spec
        self.blocks = nn.ModuleList(
            TransformerBlock(
                spec.width, spec.num_heads, spec.num_kv_heads, spec.intermediate_size, spec.eps, operations, attention
            )
            for _ in range(spec.depth)
        )

    def init_weights(self) -> None:
        """Start training from scratch."""
        init_linears(self)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Refine tokens [B, T, E]; mask [B, T], True = real, None = all real (the faster way to say so).

        What comes back at padded tokens means nothing. Raises ValueError for another width or an unfit mask.
        """
        if tokens.ndim != 3 or tokens.shape[-1] != self.spec.width:
            raise ValueError(f"tokens must be [B, T, {self.spec.width}], got {list(tokens.shape)}")
        check_mask(mask, tokens)
        mask = key_mask(mask)
        for block in self.blocks:
            tokens = block(tokens, mask)
        return tokens
