"""The pack's own socket types, and how condition tokens travel as ComfyUI's CONDITIONING.

A CONDITIONING tensor is [B, T, E + 4]: the tokens, then for each of them is_image, y and x, and a mark: 0 padding,
below 0 pooled by LAP, above 0 refined as well. Beside the tokens rather than in the dict, they stay right under core's
Concat, Average and ZeroOut, which know nothing of them. y and x are homogeneous: divide by is_image.
"""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..unifusion_core.condition import Condition
from ..unifusion_core.conditioning.hidden_states import HiddenStates, Span

VLM = io.Custom("UNIFUSION_VLM")
Hidden = io.Custom("UNIFUSION_HIDDEN")
Fusion = io.Custom("UNIFUSION_FUSION")
Adapter = io.Custom("UNIFUSION_ADAPTER")

EXTRA = 4  # channels beside the tokens
KEY = "unifusion"  # of the dict entry that holds spans and the names of VLM and model
POOLED, REFINED = -1.0, 1.0
NEITHER = "it carries no UniFusion tokens: connect UniFusion Refine (after UniFusion LAP Encode)"


def pack(condition: Condition, mark: float) -> Tensor:
    """Condition → [B, T, E + 4] float32 on the CPU."""
    tokens = condition.tokens.float().cpu()
    rows, length, _ = tokens.shape
    positions = tokens.new_zeros(rows, length, 3) if condition.positions is None else condition.positions.float().cpu()
    real = tokens.new_ones(rows, length) if condition.mask is None else condition.mask.float().cpu()
    return torch.cat([tokens, positions, mark * real[..., None]], dim=-1)


def unpack(tensor: Tensor) -> Condition:
    """The condition in a CONDITIONING tensor; its mask and positions are None where they say nothing."""
    tokens, places, mark = tensor[..., :-EXTRA], tensor[..., -EXTRA:-1].float(), tensor[..., -1]
    weight = places[..., :1]
    seen = weight.abs() > 1e-6
    positions = torch.where(seen, places / torch.where(seen, weight, 1.0), 0.0)
    mask = mark != 0
    return Condition(tokens, None if bool(mask.all()) else mask, positions if bool(seen.any()) else None)


def is_pooled(tensor: Tensor) -> bool:
    return bool((tensor[..., -1] < 0).any())


def from_pooled(pooled: HiddenStates, model: str, mixed: bool = False) -> list:
    """LAP's output → CONDITIONING. mixed: its tokens have seen each other already, by a refiner before LAP."""
    condition = Condition(pooled.states.squeeze(2), pooled.mask, pooled.positions)
    note = {"model": model, "vlm": pooled.vlm, "spans": pooled.spans, "layers": pooled.layers, "mixed": mixed}
    return [[pack(condition, POOLED), {KEY: note}]]


def to_pooled(entry: list) -> HiddenStates:
    """One pooled entry of a CONDITIONING → what the refiner takes."""
    tensor, note = entry[0], note_of(entry)
    condition = unpack(tensor)
    length = tensor.shape[:2]
    return HiddenStates(
        states=condition.tokens[:, :, None],
        mask=torch.ones(length, dtype=torch.bool) if condition.mask is None else condition.mask,
        positions=torch.zeros(*length, 3) if condition.positions is None else condition.positions,
        spans=note["spans"],
        layers=note["layers"],
        vlm=note["vlm"],
    )


def note_of(entry: list) -> dict[str, Any]:
    """What the pack wrote beside a CONDITIONING's tokens.

    Raises:
        ValueError: it is another encoder's.
    """
    if KEY not in entry[1]:
        raise ValueError(f"conditioning of width {entry[0].shape[-1]}: {NEITHER}")
    return entry[1][KEY]


def select(entry: list, kinds: tuple[str, ...], image: int | None = None, tile: int | None = None) -> list:
    """One entry of a CONDITIONING with the tokens of these spans only, pooled or refined."""
    tensor, note = entry[0], note_of(entry)
    present = sorted({span.kind for row in note["spans"] for span in row})
    if not set(kinds) & set(present):
        cure = "; connect a picture to images of UniFusion Rewrite" if "image" in kinds or "thumbnail" in kinds else ""
        raise ValueError(f"no tokens of {' or '.join(kinds)} here, only of {', '.join(present) or 'nothing'}{cure}")
    length = tensor.shape[1]
    if any(span.stop > length for row in note["spans"] for span in row):
        raise ValueError(f"the conditioning's {length} tokens are fewer than its spans name; select before shortening")
    carrier = HiddenStates(
        states=tensor[:, :, None],
        mask=torch.ones(tensor.shape[:2], dtype=torch.bool),
        positions=torch.zeros(*tensor.shape[:2], 3),
        spans=note["spans"],
        layers=note["layers"],
        vlm=note["vlm"],
    ).select(*kinds, image=image, tile=tile)
    return [carrier.states.squeeze(2), {**entry[1], KEY: {**note, "spans": carrier.spans}}]


def concatenate(first: list, second: list) -> list:
    """Two entries of a CONDITIONING, one behind the other, spans and all."""
    a, b = note_of(first), note_of(second)
    if first[0].shape[-1] != second[0].shape[-1]:
        raise ValueError(f"token widths {first[0].shape[-1] - EXTRA} and {second[0].shape[-1] - EXTRA} differ")
    rows = max(len(first[0]), len(second[0]))
    tensors = [x.expand(rows, -1, -1) for x in (first[0], second[0])]
    spans = tuple(
        (*_row(a["spans"], row), *(span.moved(first[0].shape[1]) for span in _row(b["spans"], row)))
        for row in range(rows)
    )
    return [torch.cat(tensors, dim=1), {**first[1], KEY: {**a, "spans": spans}}]


def renamed(entry: list, **words: Any) -> list:
    return [entry[0], {**entry[1], **words}]


def _row(spans: tuple[tuple[Span, ...], ...], row: int) -> tuple[Span, ...]:
    return spans[row if len(spans) > 1 else 0]
