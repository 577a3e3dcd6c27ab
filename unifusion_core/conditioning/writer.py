"""One row of a decoding batch: which token stands, what is thought and what is written, and when it is done."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

from .quotes import QuoteGuard
from .vlm.base import FrozenVLM
from .vlm.request import Prompts

THINK, THOUGHT = "<think>", "</think>"
TAIL = 16  # tokens that are sure to hold a tag

Think = Literal["keep", "drop"] | int


class Writer:
    """Follows one row.

    A thinking model's tokens up to and including `</think>` are its thinking; the rest is the rewrite. It thinks if its
    prompt ends in `<think>`, or if it writes that tag first.

    Args:
        max_new_tokens: most tokens of the rewrite; of thinking and rewrite together where thinking has no limit.
        think: a number limits the thinking to so many tokens, its opening tag among them; then the closing tag follows.
        strings: what must be spelled as it is, see `quotes.QuoteGuard`.
    """

    def __init__(
        self,
        vlm: FrozenVLM,
        prompts: Prompts,
        row: int,
        *,
        max_new_tokens: int,
        think: Think,
        stops: tuple[str, ...],
        strings: tuple[str, ...],
        on_token: Callable[[int, int, str], None] | None,
    ) -> None:
        self.vlm, self.row, self.max_new_tokens = vlm, row, max_new_tokens
        self.think_limit = think if isinstance(think, int) else None
        self.stops, self.on_token = stops, on_token
        self.ids: list[int] = []
        self.num_think = 0  # tokens of the thinking, once it is over
        self.ended: Literal["end", "stop", "length"] | None = None
        self._may_think = can_think(vlm)
        self._thinking = self._may_think and prompt_opens_thinking(vlm, prompts, row)
        self._guard = QuoteGuard(strings, self._decode, self._encode)
        self._forced: list[int] = []

    @property
    def rewrite_ids(self) -> list[int]:
        return self.ids[self.num_think :]

    def text(self) -> str:
        """The rewrite so far; the thinking so far while the model thinks."""
        return self._decode(self.rewrite_ids)

    def think_text(self) -> str:
        return self._decode(self.ids[: self.num_think]).replace(THINK, "").replace(THOUGHT, "").strip()

    def missing(self) -> list[str]:
        """The protected strings that the rewrite does not hold."""
        return self._guard.missing(self.text())

    def choose(self, proposed: int) -> int:
        """Returns the token that is written: the proposed one, or one that a limit or a protected string demands."""
        if self.ended is None and not self._forced:
            if self._thinking and self.think_limit is not None and len(self.ids) >= self.think_limit:
                self._forced = self._encode(THOUGHT)
            elif not self._thinking and proposed not in self.vlm.stop_ids:
                self._forced = self._guard.forced(self.rewrite_ids, proposed)
        return self._forced.pop(0) if self._forced else proposed

    def take(self, token: int) -> None:
        """Takes the token that was written."""
        if self.ended is not None:
            return
        if token in self.vlm.stop_ids:
            self.ended = "end"
        elif self._full():
            self.ended = "length"
        else:
            self.ids.append(token)
            if self._may_think:
                self._follow_thinking()
            self._look()

    def check(self, prompt: str) -> None:
        """Raises ValueError where what was written is no rewrite, and says what to do."""
        name = f"request {self.row}: the VLM"
        if self._thinking:
            end = "stopped" if self.ended == "end" else f"had written {len(self.ids)} tokens"
            raise ValueError(f"{name} was still thinking when it {end}; raise max_new_tokens, or limit its thinking")
        if not self.text().strip():
            raise ValueError(f"{name} wrote nothing for {prompt!r}; rephrase it")
        if missing := self.missing():
            cut = " (it was cut off: raise max_new_tokens)" if self.ended == "length" else ""
            listed = ", ".join(f'"{string}"' for string in missing)
            raise ValueError(
                f"{name} left out {listed} of the prompt{cut}; ask for it in other words, try another seed, or do not "
                "protect quotes"
            )

    def _full(self) -> bool:
        if self.think_limit is None:
            return len(self.ids) == self.max_new_tokens
        return not self._thinking and len(self.rewrite_ids) == self.max_new_tokens

    def _follow_thinking(self) -> None:
        if THOUGHT in self._decode(self.ids[-TAIL:], tags=True) and not self.num_think:
            self.num_think, self._thinking = len(self.ids), False
        elif len(self.ids) <= TAIL and not self.num_think:
            self._thinking |= self._decode(self.ids, tags=True).lstrip().startswith(THINK)

    def _look(self) -> None:
        """Reads the text so far, where anyone wants to know."""
        if not self.stops and self.on_token is None:
            return
        text = self.text()
        hits = [] if self._thinking else [text.index(string) for string in self.stops if string in text]
        if hits:
            self.ended = "stop"
            while self.rewrite_ids and len(self.text()) > min(hits):
                self.ids.pop()
        elif self.on_token is not None:
            self.on_token(self.row, self.ids[-1], text)

    def _decode(self, ids: list[int], tags: bool = False) -> str:
        return self.vlm.tokenizer.decode(ids, skip_special_tokens=not tags)

    def _encode(self, text: str) -> list[int]:
        return self.vlm.tokenizer(text, add_special_tokens=False).input_ids


def can_think(vlm: FrozenVLM) -> bool:
    """Says whether the VLM knows the tags of thinking at all."""
    return vlm.token_id(THOUGHT) is not None or THOUGHT in str(vlm.tokenizer.chat_template)


def think_room(vlm: FrozenVLM, think: Think) -> int:
    """Returns how many tokens limited thinking may take beside the rewrite, both tags included."""
    if not isinstance(think, int) or not can_think(vlm):
        return 0
    return think + sum(len(vlm.tokenizer(tag, add_special_tokens=False).input_ids) for tag in (THINK, THOUGHT))


def prompt_opens_thinking(vlm: FrozenVLM, prompts: Prompts, row: int) -> bool:
    """Says whether the prompt ends in an opened `<think>`."""
    tail = vlm.tokenizer.decode(prompts.ids[row, -TAIL:].tolist(), skip_special_tokens=False)
    return re.search(re.escape(THINK) + r"\s*$", tail) is not None
