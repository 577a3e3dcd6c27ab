"""Ways into the DiT other than its input: keys and values in every attention, or additions to the residual stream.

Letters in shapes: `B` batch, `T` condition tokens, `E` VLM width, `D` DiT width, `H` heads, `K` head width.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..layers import RMSNorm


class KeysAndValues(nn.Module):
    """Turn condition tokens [B, T, E] into keys and values [B, T, heads, K] beside those of a block's own tokens.

    UniFusion, Sec. 2.1, layerwise key-value fusion. Departs: the paper matches widths and depth to the VLM and takes
    its own keys and values; a linear over the layer's states contains those and asks for no match.
    """

    def __init__(self, condition_width: int, num_kv_heads: int, head_dim: int, eps: float, operations=nn):
        super().__init__()
        self.head_dim = head_dim
        self.norm = RMSNorm(condition_width, eps)
        self.to_k = operations.Linear(condition_width, num_kv_heads * head_dim, bias=False)
        self.to_v = operations.Linear(condition_width, num_kv_heads * head_dim, bias=False)
        self.norm_k = RMSNorm(head_dim, eps)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.norm(tokens)
        keys = self.norm_k(self.to_k(tokens).unflatten(-1, (-1, self.head_dim)))
        return keys, self.to_v(tokens).unflatten(-1, (-1, self.head_dim))


class ResidualAddition(nn.Module):
    """Bring condition tokens [B, T, E] to [B, T, D], to be added to the stream behind a block; zero before training.

    UniFusion, Sec. 2.1, hidden state injection. Departs: the paper adds as it is, which needs equal widths.
    """

    def __init__(self, condition_width: int, width: int, eps: float, operations=nn):
        super().__init__()
        self.norm = RMSNorm(condition_width, eps)
        self.linear = operations.Linear(condition_width, width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(self.norm(tokens))
