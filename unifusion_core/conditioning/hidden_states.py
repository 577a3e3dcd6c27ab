"""Hidden states of a frozen VLM together with where each token came from.

B batch, T tokens, L tapped layers, E VLM width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

SpanKind = Literal["system", "instruction", "image", "thumbnail", "rewrite"]


@dataclass(frozen=True)
class Span:
    """Names the tokens `start:stop` of one row; `image` counts the row's pictures, `tile` the tiles of one picture.

    A thumbnail belongs to an image but is no tile of it, so its `tile` is None.
    """

    kind: SpanKind
    start: int
    stop: int
    image: int | None = None
    tile: int | None = None

    def __len__(self) -> int:
        return self.stop - self.start

    def moved(self, offset: int) -> Span:
        """Returns the same span `offset` tokens further right."""
        return replace(self, start=self.start + offset, stop=self.stop + offset)


@dataclass(frozen=True, eq=False)
class HiddenStates:
    """Holds the tapped residual streams of a batch.

    Args:
        states: [B, T, L, E] in the VLM's dtype, before any final norm; padding is zero.
        mask: [B, T] bool, True where a real token stands.
        positions: [B, T, 3] float, (is_image, y, x): the token's centre as a fraction of its source image; text is 0.
        spans: per row, the named stretches in order. Markers of the chat template belong to none.
        layers: the L tapped indices; i = residual stream after i decoder layers, 0 = embeddings.
        vlm: identity of the VLM, see `FrozenVLM.identity`.
    """

    states: Tensor
    mask: Tensor
    positions: Tensor
    spans: tuple[tuple[Span, ...], ...]
    layers: tuple[int, ...]
    vlm: str

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> HiddenStates:
        """Moves the tensors; `dtype` changes the states only."""
        return replace(
            self,
            states=self.states.to(device=device, dtype=dtype),
            mask=self.mask.to(device=device),
            positions=self.positions.to(device=device),
        )

    def select(self, *kinds: SpanKind, image: int | None = None, tile: int | None = None) -> HiddenStates:
        """Keeps only the tokens of these spans, in sequence order, with rows padded on the right.

        Args:
            kinds: which spans; none given means every kind.
            image: keep this picture only (0 is the first). `tile`: keep this tile only.
        Raises:
            ValueError: an unknown kind, or no row has such a token. (A row without any, among others, is all padding.)
        """
        for kind in kinds:
            if kind not in get_args(SpanKind):
                raise ValueError(f"unknown span kind {kind!r}; one of {', '.join(get_args(SpanKind))}")

        def wanted(span: Span) -> bool:
            return (
                (not kinds or span.kind in kinds)
                and (image is None or span.image == image)
                and (tile is None or span.tile == tile)
            )

        chosen = [sorted(filter(wanted, row), key=lambda span: span.start) for row in self.spans]
        lengths = [sum(map(len, row)) for row in chosen]
        if not any(lengths):
            present = sorted({span.kind for row in self.spans for span in row})
            asked = ", ".join([*kinds] + [f"{k}={v}" for k, v in (("image", image), ("tile", tile)) if v is not None])
            raise ValueError(f"no token of {asked or 'any kind'} in any row; there are: {', '.join(present) or 'none'}")

        index = torch.zeros(len(chosen), max(lengths), dtype=torch.long)
        spans = []
        for row, picked in enumerate(chosen):
            at, moved = 0, []
            for span in picked:
                index[row, at : at + len(span)] = torch.arange(span.start, span.stop)
                moved.append(span.moved(at - span.start))
                at += len(span)
            spans.append(tuple(moved))

        index = index.to(self.states.device)
        rows = torch.arange(len(chosen), device=index.device)[:, None]
        inside = torch.arange(index.shape[1], device=index.device) < torch.tensor(lengths, device=index.device)[:, None]
        mask = self.mask[rows, index] & inside
        states, positions = self.states[rows, index], self.positions[rows, index]
        states[~mask] = 0
        positions[~mask] = 0
        return replace(self, states=states, mask=mask, positions=positions, spans=tuple(spans))
