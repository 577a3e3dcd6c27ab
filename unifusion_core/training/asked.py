"""What the frozen VLM is asked about a training sample, and the states of it that condition the DiT.

VERIFI is teacher-forced: the target prompt's tokens stand behind prompt and pictures, where the VLM would have written
them, and one forward gives their states. Only they and the picture's own tokens reach the DiT (the paper's Sec. 3).

B batch, T tokens, L tapped layers, E VLM width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from threading import Lock
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from ..conditioning.hidden_states import KEEP, HiddenStates
from ..conditioning.vlm import FrozenVLM, Request, T5TextEncoder
from ..pipeline import PAPER
from .samples import Damaged, Texts

Kind = Literal["text", "picture", "joint", "edit", "empty"]
STAGE1_MIX = {"text": 0.7, "picture": 0.2, "joint": 0.1}  # ours; the paper names the three and no shares
DESCRIBE = "Describe the picture."  # asked of a picture where the sample has no prompt of its own


@dataclass(frozen=True)
class Asked:
    """One row for the VLM. rewrite: token ids of the target prompt; request None: the true empty condition."""

    kind: Kind
    request: Request | None = None
    rewrite: tuple[int, ...] = ()


def draw_kind(is_edit: bool, rng: Random, mix: dict[str, float], dropout: float) -> Kind:
    """What a sample is used for this time; `dropout` is the share, of every kind, that the empty condition replaces."""
    kind = "edit" if is_edit else rng.choices(tuple(mix), tuple(mix.values()))[0]
    return "empty" if rng.random() < dropout else kind


class Teacher:
    """The frozen VLM with the words of a sample put into its mouth."""

    def __init__(self, vlm: FrozenVLM, tiles: Sequence[int] = (9,), most_tokens: int = 300) -> None:
        self.vlm, self.tiles, self.most_tokens = vlm, tuple(tiles), most_tokens
        self._empty: HiddenStates | None = None
        self._lock = Lock()  # a fast tokenizer is of one thread at a time

    def ask(self, kind: Kind, texts: Texts, picture: Image.Image | None, rng: Random) -> Asked:
        """Writes the row of one sample.

        Raises:
            Damaged: the VLM does not take its texts or its picture.
        """
        if kind == "empty":
            return Asked(kind)
        images = () if kind == "text" else (picture,)
        written = None if kind == "picture" else texts.caption or texts.instruction
        prompt = {
            "text": texts.prompt or texts.caption,
            "picture": "",
            "joint": texts.prompt or DESCRIBE,
            "edit": texts.instruction,
        }[kind]
        request = Request(prompt, images, max_tiles=rng.choice(self.tiles))
        with self._lock:
            ids = () if written is None else self.vlm.tokenizer(written, add_special_tokens=False).input_ids
            try:
                self.vlm.count_tokens(request)
            except ValueError as error:
                raise Damaged(f"the VLM does not take it: {error}") from None
        asked = Asked(kind, request, tuple(ids[: self.most_tokens]))
        if any(i in self.vlm.image_token_ids for i in asked.rewrite):
            raise Damaged("its caption holds a control token of the VLM")
        return asked

    def states(self, rows: Sequence[Asked]) -> tuple[Tensor, Tensor, Tensor]:
        """States [B, T, L, E] in the VLM's dtype, mask [B, T] and positions [B, T, 3], in the order of `rows`."""
        found: dict[int, HiddenStates] = {}
        for pictured in (False, True):  # apart, or every caption would be padded to the length of a tiled picture
            numbers = [i for i, row in enumerate(rows) if row.request and bool(row.request.images) == pictured]
            if numbers:
                chosen = [rows[i] for i in numbers]
                with self._lock:
                    hidden = self.vlm.encode([row.request for row in chosen], [row.rewrite for row in chosen])
                hidden = hidden.select(*KEEP[PAPER])
                found |= {number: (hidden, at) for at, number in enumerate(numbers)}
        return _join([found.get(i, (self.empty(), 0)) for i in range(len(rows))])

    def empty(self) -> HiddenStates:
        if self._empty is None:
            self._empty = self.vlm.encode_empty()
        return self._empty


class PromptTeacher:
    """A T5 in the VLM's place: the words of a prompt condition the picture, and nothing else.

    `Asked.rewrite` holds the prompt's own tokens here.
    """

    def __init__(self, encoder: T5TextEncoder, most_tokens: int = 300) -> None:
        self.encoder, self.most_tokens = encoder, most_tokens
        self._lock = Lock()

    def ask(self, kind: Kind, texts: Texts, picture: Image.Image | None, rng: Random) -> Asked:
        """As `Teacher.ask`; the prompt is the sample's own, or else its caption.

        Raises:
            ValueError: a kind with a picture.
        """
        if kind not in ("text", "empty"):
            raise ValueError(f"a sample of the kind {kind!r}: T5 reads text alone; train it on text (--mix 1,0,0)")
        with self._lock:
            *words, end = self.encoder.ids("" if kind == "empty" else texts.prompt or texts.caption)
        return Asked(kind, rewrite=(*words[: self.most_tokens - 1], end))

    def states(self, rows: Sequence[Asked]) -> tuple[Tensor, Tensor, Tensor]:
        """As `Teacher.states`."""
        states, mask = self.encoder.states([row.rewrite for row in rows])
        return states[:, :, None], mask, torch.zeros(*mask.shape, 3, device=mask.device)


def _join(rows: Sequence[tuple[HiddenStates, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of several batches as one, padded on the right."""
    lengths = [int(hidden.mask[at].sum()) for hidden, at in rows]
    first = rows[0][0]
    states = first.states.new_zeros(len(rows), max(lengths), *first.states.shape[2:])
    positions = first.positions.new_zeros(len(rows), max(lengths), 3)
    for row, ((hidden, at), length) in enumerate(zip(rows, lengths, strict=True)):
        states[row, :length], positions[row, :length] = hidden.states[at, :length], hidden.positions[at, :length]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return states, mask.to(states.device), positions
