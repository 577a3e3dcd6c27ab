"""Hidden states of a frozen VLM together with where each token came from.

B batch, T tokens, L tapped layers, E VLM width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

SpanKind = Literal["prefix", "system", "instruction", "image", "thumbnail", "marker", "think", "rewrite"]

# Which tokens are worth keeping. "image + rewrite" is the paper's Sec. 3; "user turn" is what Krea 2 trained on.
KEEP: dict[str, tuple[SpanKind, ...]] = {
    "rewrite": ("rewrite",),
    "image + rewrite": ("image", "thumbnail", "rewrite"),
    "user turn": ("image", "thumbnail", "instruction", "marker"),
    "think + rewrite": ("think", "rewrite"),
    "think": ("think",),
    "all": ("instruction", "image", "thumbnail", "marker", "think", "rewrite"),
    "everything": get_args(SpanKind),
    "image": ("image", "thumbnail"),  # the first track of a zero-shot edit: pictures first, then words
}


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
        spans: per row, the named stretches in order; every real token belongs to exactly one. "prefix" and "marker" are
            the template's own tokens, before and from the start of the user's content.
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

    def tapping(self, layers: Sequence[int]) -> HiddenStates:
        """Keeps these of the tapped layers; the same object where they are all.

        Raises:
            ValueError: a layer that was not tapped.
        """
        if tuple(layers) == self.layers:
            return self
        if lacking := [layer for layer in layers if layer not in self.layers]:
            raise ValueError(f"layers {lacking} were not tapped; there are {self.layers}")
        places = [self.layers.index(layer) for layer in layers]
        return replace(self, states=self.states[:, :, places], layers=tuple(layers))

    def keep(self, mode: str) -> HiddenStates:
        """Keeps the tokens of one of the `KEEP` modes, as `select`.

        Raises:
            ValueError: an unknown mode, or no row has such a token.
        """
        if mode not in KEEP:
            raise ValueError(f"unknown mode {mode!r} of states to keep; one of {', '.join(KEEP)}")
        return self.select(*KEEP[mode])

    def with_thinking(self, lengths: Sequence[int]) -> HiddenStates:
        """Names the first tokens of each row's rewrite "think"; `lengths` says how many."""
        rows = []
        for row, length in zip(self.spans, lengths, strict=True):
            spans: list[Span] = []
            for span in row:
                if span.kind != "rewrite" or not length:
                    spans.append(span)
                    continue
                middle = span.start + length
                spans.append(Span("think", span.start, middle))
                if middle < span.stop:
                    spans.append(replace(span, start=middle))
            rows.append(tuple(spans))
        return replace(self, spans=tuple(rows))

    def without(self, kind: SpanKind) -> HiddenStates:
        """Drops the tokens of one kind, as `select` of all others; the same object where there are none."""
        if not any(span.kind == kind for row in self.spans for span in row):
            return self
        return self.select(*(other for other in get_args(SpanKind) if other != kind))

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
