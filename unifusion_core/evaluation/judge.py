"""A picture and a question → what a vision-language model says, and how sure it is of yes.

B pairs of a batch.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from PIL import Image
from torch import Tensor

from ..conditioning.vlm import FrozenVLM, Request

Pair = tuple[Image.Image, str]

REASONING = """Look at the picture and answer a question about it.

Question: {question}

First describe all that the picture shows of what the question asks about, and check each part of the question against \
it, step by step. Only then decide. The last line of your reply must be "Answer: yes" or "Answer: no"."""
MAX_NEW_TOKENS = 512

# "yes or no", where a reply only repeats what it was asked
_CHOICE = re.compile(r"\b(?:yes|no)\W{0,4}(?:\bor\b|/)\W{0,4}(?:answer\W{1,8})?(?:yes|no)\b", re.I)
_MARKED = re.compile(r"\banswer\b[^\w\n]{0,8}(?:is[^\w\n]{1,8})?(yes|no)(?=\s*(?:$|[^\w\s]))", re.I | re.M)
_ALONE = re.compile(r"\W*(yes|no)\W*", re.I)


class Answer(NamedTuple):
    """What was said; `yes` and `no` are the probabilities of these words where the decision fell, None if it did not.

    Each is the sum over the spellings that are one token ("Yes", "yes", " Yes" …), of the whole vocabulary's 1.
    """

    text: str
    yes: float | None = None
    no: float | None = None

    @property
    def yes_probability(self) -> float | None:
        """Yes against no alone, 0..1."""
        if self.yes is None or self.no is None or self.yes + self.no <= 0:
            return None
        return self.yes / (self.yes + self.no)


class Judge(Protocol):
    """Whatever answers questions about pictures; `identity` tells judges and their settings apart."""

    identity: str

    def answer(self, pairs: Sequence[Pair]) -> list[Answer]:
        """Answers each question about its own picture."""
        ...


class VLMJudge:
    """A frozen VLM as a judge, greedy.

    Args:
        reasoning: let it think aloud before it decides, as the refined DPG-Bench does; off: it is asked as is, and only
            its first token counts, as VQAScore does.
        max_new_tokens: of the thinking; what is cut off holds no decision.
        max_tiles: per picture.
    Raises:
        ValueError: without reasoning, a tokenizer that has no single token for yes, or none for no.
    Paper: App. A.3.2, "Upgrade Question-Answering Model". The paper's wording is not published; this one is ours.
    """

    def __init__(
        self, vlm: FrozenVLM, *, reasoning: bool = True, max_new_tokens: int = MAX_NEW_TOKENS, max_tiles: int = 9
    ) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {max_new_tokens}: expected at least 1")
        self.vlm, self.reasoning, self.max_tiles = vlm, reasoning, max_tiles
        self.max_new_tokens = max_new_tokens if reasoning else 1
        self.yes_ids, self.no_ids = single_tokens(vlm, "yes"), single_tokens(vlm, "no")
        if not reasoning and not (self.yes_ids and self.no_ids):
            raise ValueError(f"judge {vlm.identity}: its tokenizer has no single token for yes, or none for no")
        words = hashlib.sha256(REASONING.encode()).hexdigest()[:8] if reasoning else "asked-as-is"
        dtype = str(vlm.dtype).removeprefix("torch.")
        self.identity = f"{vlm.identity} {dtype} {words} tokens={self.max_new_tokens} tiles={max_tiles}"

    def answer(self, pairs: Sequence[Pair]) -> list[Answer]:
        """Answers each question about its own picture, all in one batch.

        Raises:
            ValueError: a question that holds a control token of the VLM, or does not fit its context.
        """
        requests = [
            Request(self.words(question), (picture,), system="", max_tiles=self.max_tiles)
            for picture, question in pairs
        ]
        prompts = self.vlm.prepare(requests, room=self.max_new_tokens)
        rows = [_Row(self.vlm.stop_ids, {*self.yes_ids, *self.no_ids}) for _ in pairs]

        def choose(logits: Tensor) -> Tensor:
            chosen = logits.argmax(-1)
            shares = logits.float().softmax(-1)
            yes, no = (shares[:, list(ids)].sum(-1).tolist() for ids in (self.yes_ids, self.no_ids))
            for row, token, *odds in zip(rows, chosen.tolist(), yes, no, strict=True):
                row.see(token, odds, always=not self.reasoning)
            return chosen

        def after_step(tokens: list[int]) -> list[bool]:
            return [row.take(token) for row, token in zip(rows, tokens, strict=True)]

        self.vlm.generate(prompts, self.max_new_tokens, choose=choose, after_step=after_step)
        texts = (self.vlm.tokenizer.decode(row.ids, skip_special_tokens=True).strip() for row in rows)
        return [Answer(text, *row.odds) for text, row in zip(texts, rows, strict=True)]

    def words(self, question: str) -> str:
        """What the VLM is given to read."""
        return REASONING.format(question=question.strip()) if self.reasoning else question.strip()


def read_verdict(text: str) -> bool | None:
    """Reads yes (True) or no (False) off a reply; None where it decides nothing.

    The last "Answer: yes" or "Answer: no" counts, else a last line of that word alone. Nothing else is guessed at.
    """
    text = _CHOICE.sub("", text)
    if marked := _MARKED.findall(text):
        return marked[-1].lower() == "yes"
    lines = text.strip().splitlines()
    alone = _ALONE.fullmatch(lines[-1]) if lines else None
    return alone[1].lower() == "yes" if alone else None


def single_tokens(vlm: FrozenVLM, word: str) -> tuple[int, ...]:
    """The ids of a word's spellings that are one token each: small, capitalised or large, with or without a space."""
    found = set()
    for spelling in (word, word.capitalize(), word.upper()):
        for text in (spelling, f" {spelling}"):
            ids = vlm.tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) == 1 and ids[0] != vlm.tokenizer.unk_token_id:
                found.add(ids[0])
    return tuple(sorted(found))


class _Row:
    """Follows one reply: its tokens, and the odds at its latest yes or no."""

    def __init__(self, stop_ids: Sequence[int], words: set[int]) -> None:
        self.stop_ids, self.words = stop_ids, words
        self.ids: list[int] = []
        self.odds: list[float] = []
        self.done = False

    def see(self, token: int, odds: list[float], *, always: bool) -> None:
        if not self.done and (always or token in self.words):
            self.odds = odds

    def take(self, token: int) -> bool:
        self.done = self.done or token in self.stop_ids
        if not self.done:
            self.ids.append(token)
        return self.done
