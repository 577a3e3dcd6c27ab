"""The diffusion transformer: condition tokens and latent tokens in one sequence under full self-attention.

Letters in shapes: `B` batch, `T` condition tokens, `E` VLM width, `N` latent tokens, `D` DiT width, `H` heads,
`C` latent channels, `h w` latent size, `p` patch size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import (
    Attention,
    GatedAttention,
    RMSNorm,
    RotaryTables,
    SwiGLU,
    check_mask,
    init_linears,
    key_mask,
    rotary_tables,
    sdpa,
)
from .injection import KeysAndValues, ResidualAddition

ImagePositions = Literal["zero", "source"]
Injection = Literal["input", "keys", "residual"]


@dataclass(frozen=True, kw_only=True)
class DiTSpec:
    """Sizes of a DiT.

    in_channels: C of the latents, before patches. condition_width: E. axes_dim: channels of a head turned by the three
    rotary axes (0, row, column), together head_dim. image_positions: where condition tokens that come from an image
    stand among the rotary positions: all at zero as in Krea 2, or at their place in the source, laid over the latents.
    injection: where the condition enters: in the input sequence (the paper's choice), as keys and values of every
    attention, or in the input and again behind every block (`injection.py`).
    """

    in_channels: int
    patch_size: int
    depth: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int
    intermediate_size: int
    timestep_dim: int = 256
    condition_width: int
    axes_dim: tuple[int, int, int]
    theta: float = 1000.0
    eps: float = 1e-5
    image_positions: ImagePositions = "zero"
    injection: Injection = "input"

    def __post_init__(self):
        object.__setattr__(self, "axes_dim", tuple(self.axes_dim))
        if len(self.axes_dim) != 3 or sum(self.axes_dim) != self.head_dim or any(dim % 2 for dim in self.axes_dim):
            raise ValueError(f"axes_dim must be three even numbers of sum {self.head_dim} (head_dim): {self.axes_dim}")
        if self.timestep_dim % 2:
            raise ValueError(f"timestep_dim must be even, got {self.timestep_dim}")
        if self.image_positions not in get_args(ImagePositions):
            raise ValueError(f"image_positions must be one of {get_args(ImagePositions)}, got {self.image_positions!r}")
        if self.injection not in get_args(Injection):
            raise ValueError(f"injection must be one of {get_args(Injection)}, got {self.injection!r}")

    @property
    def slots(self) -> int:
        """Vectors that a condition token brings, each E wide: one for every place where it enters."""
        return {"input": 1, "keys": self.depth, "residual": self.depth + 1}[self.injection]

    @property
    def width(self) -> int:
        """D, the width of the residual stream."""
        return self.num_heads * self.head_dim


def pack(latents: Tensor, patch_size: int) -> Tensor:
    """Cut latents [B, C, h, w] into patches in reading order: [B, N, C p p], channels slowest within a patch."""
    p = patch_size
    patches = latents.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # [B, C, h/p, p, w/p, p]
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, num_rows: int, num_columns: int, patch_size: int) -> Tensor:
    """Undo `pack`: tokens [B, N, C p p] of num_rows x num_columns patches become latents [B, C, h, w]."""
    p = patch_size
    patches = tokens.unflatten(2, (-1, p, p)).unflatten(1, (num_rows, num_columns))  # [B, h/p, w/p, C, p, p]
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


class TimestepEmbedding(nn.Module):
    """Embed the flow time t in 0..1 as cosines and sines of 1000 t, then two linear layers."""

    def __init__(self, timestep_dim: int, width: int, operations=nn):
        super().__init__()
        self.timestep_dim = timestep_dim
        self.linear_1 = operations.Linear(timestep_dim, width)
        self.linear_2 = operations.Linear(width, width)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        half = self.timestep_dim // 2
        exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
        angles = 1000.0 * t.float()[:, None, None] * torch.exp(-math.log(10000.0) * exponents)
        waves = torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype)
        return self.linear_2(F.gelu(self.linear_1(waves), approximate="tanh"))  # [B, 1, D]


class ConditionProjection(nn.Module):
    """Bring condition tokens [B, T, E] to the width of the DiT [B, T, D]."""

    def __init__(self, condition_width: int, width: int, eps: float, operations=nn):
        super().__init__()
        self.norm = RMSNorm(condition_width, eps)
        self.linear_1 = operations.Linear(condition_width, width)
        self.linear_2 = operations.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(self.norm(tokens)), approximate="tanh"))


class DiTBlock(nn.Module):
    """Attention and feed-forward, scaled, shifted and gated by a modulation all blocks share plus its own table."""

    def __init__(self, spec: DiTSpec, operations=nn, attention: Attention = sdpa):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.zeros(6, spec.width))
        self.norm1 = RMSNorm(spec.width, spec.eps)
        self.attn = GatedAttention(spec.width, spec.num_heads, spec.num_kv_heads, spec.eps, operations, attention)
        self.norm2 = RMSNorm(spec.width, spec.eps)
        self.ff = SwiGLU(spec.width, spec.intermediate_size, operations)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        rotary: RotaryTables,
        mask: Tensor | None,
        beside: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        modulation = modulation + self.scale_shift_table.to(modulation)  # [B, 1, 6, D]
        scale1, shift1, gate1, scale2, shift2, gate2 = modulation.unbind(-2)
        out = self.attn(torch.addcmul(shift1, 1.0 + scale1, self.norm1(x)), mask, rotary, beside)
        x = torch.addcmul(x, gate1, out)
        out = self.ff(torch.addcmul(shift2, 1.0 + scale2, self.norm2(x)))
        return torch.addcmul(x, gate2, out)


class FinalLayer(nn.Module):
    """Modulated norm and the projection of latent tokens [B, N, D] to patches of velocity [B, N, C p p]."""

    def __init__(self, width: int, out_channels: int, eps: float, operations=nn):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.zeros(2, width))
        self.norm = RMSNorm(width, eps)
        self.linear = operations.Linear(width, out_channels)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = (time + self.scale_shift_table.to(time)).split(1, dim=1)
        return self.linear(torch.addcmul(shift, 1.0 + scale, self.norm(x)))


class DiT(nn.Module):
    """Predict the velocity of noisy latents under a condition: a single-stream transformer, the one of Krea 2."""

    def __init__(self, spec: DiTSpec, operations=nn, attention: Attention = sdpa):
        super().__init__()
        self.spec = spec
        width, patch_channels = spec.width, spec.in_channels * spec.patch_size**2
        if spec.injection != "keys":
            self.txt_in = ConditionProjection(spec.condition_width, width, spec.eps, operations)
        self.img_in = operations.Linear(patch_channels, width)
        self.time_embed = TimestepEmbedding(spec.timestep_dim, width, operations)
        self.time_mod_proj = operations.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(DiTBlock(spec, operations, attention) for _ in range(spec.depth))
        self.final_layer = FinalLayer(width, patch_channels, spec.eps, operations)
        if spec.injection == "keys":
            heads = spec.num_kv_heads or spec.num_heads
            self.injections = nn.ModuleList(
                KeysAndValues(spec.condition_width, heads, spec.head_dim, spec.eps, operations)
                for _ in range(spec.depth)
            )
        if spec.injection == "residual":
            self.injections = nn.ModuleList(
                ResidualAddition(spec.condition_width, width, spec.eps, operations) for _ in range(spec.depth)
            )

    def init_weights(self) -> None:
        """Start training from scratch: the velocity is zero, the gates of the blocks are about 0.1 at any width."""
        init_linears(self)
        nn.init.normal_(self.time_mod_proj.weight, std=0.3 / math.sqrt(self.spec.width))
        nn.init.zeros_(self.final_layer.linear.weight)
        if self.spec.injection == "residual":
            for injection in self.injections:
                nn.init.zeros_(injection.linear.weight)

    def forward(
        self, latents: Tensor, t: Tensor, tokens: Tensor, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Velocity [B, C, h, w] at latents [B, C, h, w] and flow time t [B] (1 noise, 0 data), given tokens [B, T, E].

        With more slots than one, a token's vectors stand behind each other: [B, T, slots E].

        mask [B, T]: True = real token; None = all real, which keeps the fast attention kernels.
        positions [B, T, 3]: (is_image, y, x) with the token's centre as fractions of its source image; None = all zero.
        Only a spec with image_positions="source" reads them. Raises ValueError for shapes that do not fit the spec.
        """
        self._check(latents, t, tokens, mask, positions)
        num_tokens, p = tokens.shape[1], self.spec.patch_size
        num_rows, num_columns = latents.shape[2] // p, latents.shape[3] // p

        time = self.time_embed(t, latents.dtype)  # [B, 1, D]
        modulation = self.time_mod_proj(F.gelu(time, approximate="tanh")).unflatten(-1, (6, -1))
        rotary = self._rotary(tokens, positions, num_rows, num_columns)
        if mask is not None:
            mask = key_mask(F.pad(mask, (0, num_rows * num_columns), value=True))

        slots = tokens.unflatten(-1, (self.spec.slots, -1)).unbind(2)  # each [B, T, E]
        x = self.img_in(pack(latents, p))
        if self.spec.injection == "keys":
            rotary = tuple(table[:, num_tokens:] for table in rotary)
            for block, injection, slot in zip(self.blocks, self.injections, slots, strict=True):
                x = block(x, modulation, rotary, mask, injection(slot))
            return unpack(self.final_layer(x, time), num_rows, num_columns, p)
        x = torch.cat((self.txt_in(slots[0]), x), dim=1)  # [B, T+N, D]
        for number, block in enumerate(self.blocks):
            x = block(x, modulation, rotary, mask)
            if self.spec.injection == "residual":
                added = self.injections[number](slots[number + 1])
                x = torch.cat((x[:, :num_tokens] + added, x[:, num_tokens:]), dim=1)
        return unpack(self.final_layer(x[:, num_tokens:], time), num_rows, num_columns, p)

    def _rotary(self, tokens: Tensor, positions: Tensor | None, num_rows: int, num_columns: int) -> RotaryTables:
        rows = torch.arange(num_rows, dtype=torch.float32, device=tokens.device)
        columns = torch.arange(num_columns, dtype=torch.float32, device=tokens.device)
        grid = torch.stack(torch.meshgrid(rows.new_zeros(1), rows, columns, indexing="ij"), dim=-1).reshape(1, -1, 3)
        condition = grid.new_zeros(1, tokens.shape[1], 3)
        if self.spec.image_positions == "source" and positions is not None:
            # The grid counts cells from their centres, so the centre of cell i lies at fraction (i + 1/2) / size.
            size = grid.new_tensor((num_rows, num_columns))
            yx = torch.where(positions[..., :1] == 1, positions[..., 1:].float() * size - 0.5, 0.0)
            condition = F.pad(yx, (1, 0))
            grid = grid.expand(len(tokens), -1, -1)
        return rotary_tables(torch.cat((condition, grid), dim=1), self.spec.axes_dim, self.spec.theta)

    def _check(self, latents: Tensor, t: Tensor, tokens: Tensor, mask: Tensor | None, positions: Tensor | None) -> None:
        spec, batch = self.spec, len(latents)
        if latents.ndim != 4 or latents.shape[1] != spec.in_channels:
            raise ValueError(f"latents must be [B, {spec.in_channels}, h, w], got {list(latents.shape)}")
        if latents.shape[2] % spec.patch_size or latents.shape[3] % spec.patch_size:
            raise ValueError(
                f"latent height and width must be multiples of the patch size {spec.patch_size}, "
                f"got {latents.shape[2]} x {latents.shape[3]}"
            )
        if t.shape != (batch,):
            raise ValueError(f"t must be [{batch}], one time for each latent, got {list(t.shape)}")
        width = spec.slots * spec.condition_width
        if tokens.ndim != 3 or tokens.shape[0] != batch or tokens.shape[2] != width:
            raise ValueError(f"tokens must be [{batch}, T, {width}], got {list(tokens.shape)}")
        check_mask(mask, tokens)
        if positions is not None and positions.shape != (*tokens.shape[:2], 3):
            raise ValueError(f"positions must be {[*tokens.shape[:2], 3]}, got {list(positions.shape)}")
