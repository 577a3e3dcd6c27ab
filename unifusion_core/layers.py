"""Building blocks shared by the fusion head and the DiT: the transformer dialect of Krea 2.

Letters in shapes: `B` rows, `T` tokens, `D` width, `H` heads, `K` head width.

Every linear layer comes from `operations` (any namespace with a `Linear` of torch's signature) and every attention goes
through `attention(q, k, v, mask) -> out`, each [B, H, T, K], so that a host such as ComfyUI can substitute its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attention = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
RotaryTables = tuple[Tensor, Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """torch's scaled dot product attention of q, k, v [B, H, T, K]; mask (True = attend) broadcasts to [B, H, T, T]."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def key_mask(mask: Tensor | None) -> Tensor | None:
    """Turn a mask of real tokens [B, T] into one over attention keys [B, 1, 1, T]; None (all real) stays None."""
    return None if mask is None else mask[:, None, None, :]


def check_mask(mask: Tensor | None, tokens: Tensor) -> None:
    """Raise ValueError unless `mask` is None or boolean [B, T] for `tokens` [B, T, ...]."""
    if mask is not None and (mask.dtype != torch.bool or mask.shape != tokens.shape[:2]):
        raise ValueError(f"mask must be bool {list(tokens.shape[:2])}, got {mask.dtype} {list(mask.shape)}")


def check_states(states: Tensor, num_layers: int, width: int, drop_layers: Sequence[int] = ()) -> None:
    """Raise ValueError unless `states` are [B, T, num_layers, width] and the dropped layers lie among them."""
    if states.ndim != 4 or states.shape[2:] != (num_layers, width):
        raise ValueError(f"states must be [B, T, {num_layers} layers, {width} wide], got {list(states.shape)}")
    if unknown := [layer for layer in drop_layers if not 0 <= layer < num_layers]:
        raise ValueError(f"drop_layers must lie in 0..{num_layers - 1}, got {unknown}")


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, scaled by 1 + weight; computed in float32, returned in x's dtype."""

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.device, torch.float32)  # a host that runs out of memory may leave it on the CPU
        return F.rms_norm(x.float(), self.weight.shape, weight + 1.0, self.eps).to(x.dtype)


class SwiGLU(nn.Module):
    """Gated feed-forward: down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, width: int, intermediate_size: int, operations=nn):
        super().__init__()
        self.gate = operations.Linear(width, intermediate_size, bias=False)
        self.up = operations.Linear(width, intermediate_size, bias=False)
        self.down = operations.Linear(intermediate_size, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class GatedAttention(nn.Module):
    """Self-attention with normalised queries and keys, grouped key-value heads and a sigmoid gate on its output.

    Raises ValueError if `width` does not divide into `num_heads`, or `num_heads` into `num_kv_heads`.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        eps: float = 1e-5,
        operations=nn,
        attention: Attention = sdpa,
    ):
        super().__init__()
        num_kv_heads = num_kv_heads or num_heads
        if width % num_heads:
            raise ValueError(f"width {width} must be a multiple of num_heads {num_heads}")
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads {num_heads} must be a multiple of num_kv_heads {num_kv_heads}")
        self.head_dim = width // num_heads
        self.group_size = num_heads // num_kv_heads
        self.attention = attention
        self.to_q = operations.Linear(width, width, bias=False)
        self.to_k = operations.Linear(width, num_kv_heads * self.head_dim, bias=False)
        self.to_v = operations.Linear(width, num_kv_heads * self.head_dim, bias=False)
        self.to_gate = operations.Linear(width, width, bias=False)
        self.norm_q = RMSNorm(self.head_dim, eps)
        self.norm_k = RMSNorm(self.head_dim, eps)
        self.to_out = operations.Linear(width, width, bias=False)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        rotary: RotaryTables | None = None,
        beside: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend among x [B, T, D] and to `beside`, keys and values [B, T', H', K] that come first in the mask."""
        q = self.norm_q(self.to_q(x).unflatten(-1, (-1, self.head_dim)))  # [B, T, H, K]
        k = self.norm_k(self.to_k(x).unflatten(-1, (-1, self.head_dim)))
        v = self.to_v(x).unflatten(-1, (-1, self.head_dim))
        if rotary is not None:
            q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
        if beside is not None:
            k, v = torch.cat((beside[0], k), dim=1), torch.cat((beside[1], v), dim=1)
        if self.group_size > 1:  # Every SDPA kernel takes equal heads; not every one takes enable_gqa with a mask.
            k, v = k.repeat_interleave(self.group_size, dim=2), v.repeat_interleave(self.group_size, dim=2)
        out = self.attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)  # [B, H, T, K]
        return self.to_out(out.transpose(1, 2).flatten(2) * torch.sigmoid(self.to_gate(x)))


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward, without positions and without modulation: the block of LAP and refiner."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        num_kv_heads: int | None,
        intermediate_size: int,
        eps: float = 1e-5,
        operations=nn,
        attention: Attention = sdpa,
    ):
        super().__init__()
        self.norm1 = RMSNorm(width, eps)
        self.attn = GatedAttention(width, num_heads, num_kv_heads, eps, operations, attention)
        self.norm2 = RMSNorm(width, eps)
        self.ff = SwiGLU(width, intermediate_size, operations)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.ff(self.norm2(x))


def rotary_tables(positions: Tensor, axes_dim: Sequence[int], theta: float) -> RotaryTables:
    """Cosines and signed sines for `apply_rotary`, each float32 [..., T, 1, K], from positions [..., T, axes].

    Axis a turns its own `axes_dim[a]` channels; the channels (2i, 2i + 1) of an axis form a pair that turns by
    position * theta^(-2i / axes_dim[a]). Compute them once per forward.
    """
    dtype = torch.float32 if positions.device.type == "mps" else torch.float64
    angles = [
        positions[..., axis, None].to(dtype)
        * theta ** (torch.arange(0, dim, 2, dtype=dtype, device=positions.device) / -dim)
        for axis, dim in enumerate(axes_dim)
    ]
    angles = torch.cat(angles, dim=-1).unsqueeze(-2)  # [..., T, 1, K/2]
    cos, sin = angles.cos().float(), angles.sin().float()
    return cos.repeat_interleave(2, dim=-1), torch.stack((-sin, sin), dim=-1).flatten(-2)


def apply_rotary(x: Tensor, tables: RotaryTables) -> Tensor:
    """Turn the channel pairs of x [B, T, H, K] by `rotary_tables`; computed in float32, returned in x's dtype."""
    cos, signed_sin = tables
    wide = x.float()
    swapped = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(wide * cos, swapped, signed_sin).to(x.dtype)


def init_linears(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every linear layer in `module`, for training from scratch."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
