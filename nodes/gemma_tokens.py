"""Gemma's SentencePiece model, as core carries it, with the face of a fast tokenizer: one that tells offsets."""

from __future__ import annotations

import re
from functools import cached_property
from itertools import groupby

from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import AddedToken, BatchEncoding

# Ids of Gemma-3; the picture's own token lies behind the SentencePiece model.
CONTROL = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "<start_of_turn>": 105,
    "<end_of_turn>": 106,
    "<start_of_image>": 255999,
    "<end_of_image>": 256000,
    "<image_soft_token>": 262144,
}


class GemmaTokens:
    """What FrozenVLM asks of a tokenizer, over a `sentencepiece.SentencePieceProcessor`."""

    is_fast = True
    chat_template = None  # the family's
    bos_token, eos_token, pad_token = "<bos>", "<eos>", "<pad>"
    eos_token_id, pad_token_id = CONTROL["<eos>"], CONTROL["<pad>"]
    all_special_tokens = tuple(CONTROL)
    added_tokens_decoder = {i: AddedToken(token, special=True) for token, i in CONTROL.items()}

    def __init__(self, processor) -> None:
        self.processor = processor
        self._parts = re.compile("(" + "|".join(map(re.escape, CONTROL)) + ")")
        self._names = {i: token for token, i in CONTROL.items()}

    def __call__(
        self, text: str, add_special_tokens: bool = False, return_offsets_mapping: bool = False
    ) -> BatchEncoding:
        """Returns `input_ids` and `offset_mapping` of a text; control tokens are read where they are written."""
        ids, offsets, at = [], [], 0
        for part in self._parts.split(text):
            if part in CONTROL:
                ids.append(CONTROL[part])
                offsets.append((at, at + len(part)))
            elif part:
                found = self.processor.encode(part, add_bos=False, add_eos=False)
                ids += found
                offsets += [(at + start, at + stop) for start, stop in self._offsets(part, found)]
            at += len(part)
        return BatchEncoding({"input_ids": ids} | ({"offset_mapping": offsets} if return_offsets_mapping else {}))

    def decode(self, ids, skip_special_tokens: bool = True) -> str:
        """Returns the text of ids; rows behind the vocabulary have none."""
        size, text = self.processor.get_piece_size(), ""
        for control, run in groupby(map(int, ids), key=self._names.get):
            if control is None:
                text += self.processor.decode([i for i in run if i < size])
            elif not skip_special_tokens:
                text += control * len(list(run))
        return text

    def __len__(self) -> int:
        return max(self.processor.get_piece_size(), *(i + 1 for i in self._names))

    def get_vocab(self) -> dict[str, int]:
        return self._vocab

    def convert_ids_to_tokens(self, token_id: int) -> str | None:
        if token_id in self._names:
            return self._names[token_id]
        return self.processor.id_to_piece(token_id) if token_id < self.processor.get_piece_size() else None

    def apply_chat_template(self, messages: list[dict], *, chat_template: str, tokenize: bool = False, **values) -> str:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        return environment.from_string(chat_template).render(messages=messages, bos_token=self.bos_token, **values)

    def _offsets(self, text: str, ids: list[int]) -> list[tuple[int, int]]:
        """Gemma's model changes no character, so pieces and bytes lie end to end."""
        found, at, seen = [], 0, 0
        for i in ids:
            if self.processor.is_byte(i):
                found.append((at, at + 1))
                seen += 1
                if seen == len(text[at : at + 1].encode()):
                    at, seen = at + 1, 0
            else:
                length = len(self.processor.id_to_piece(i))
                found.append((at, at + length))
                at += length
        if at != len(text):
            raise ValueError("the CLIP's SentencePiece model changes the text it splits; it is not that of Gemma-3")
        return found

    @cached_property
    def _vocab(self) -> dict[str, int]:
        pieces = range(self.processor.get_piece_size())
        return {self.processor.id_to_piece(i): i for i in pieces} | CONTROL
