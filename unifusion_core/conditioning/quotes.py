"""Strings in quotation marks: which ones a prompt holds, and how a rewrite is made to spell them the same.

The paper names spelling as VERIFI's weakness: the rewriter changes lettering on the way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

# opening mark -> what may close it; German, Nordic and Polish share marks with English, in other roles
MARKS = {
    '"': '"',
    "'": "'",
    "\u201c": "\u201d",  # English, Chinese
    "\u2018": "\u2019",
    "\u201e": "\u201c\u201d",  # German, Polish
    "\u201a": "\u2018\u2019",
    "\u201d": "\u201d",  # Swedish, Finnish
    "\u00ab": "\u00bb",  # French, Russian
    "\u00bb": "\u00ab",  # German books
    "\u2039": "\u203a",
    "\u203a": "\u2039",
    "\u300c": "\u300d",  # Japanese, traditional Chinese
    "\u300e": "\u300f",
    "\u301d": "\u301f",
    "\uff02": "\uff02",  # full width
    "\uff07": "\uff07",
}
AMBIGUOUS = "\"'\u2018\u2019\u201c\u201d\u00ab\u00bb\u2039\u203a"  # a neighbour tells whether they open or close
LONGEST = 300  # characters between two marks
BROKEN = "\ufffd"
ENDS = {mark: re.compile(f"[{closing}\n]") for mark, closing in MARKS.items()}
LETTER = re.compile(r"[0-9A-Za-z\u00aa-\u1fff]")  # of scripts that put spaces between words


def quoted(text: str) -> tuple[str, ...]:
    """Returns the strings that stand in quotation marks, in order, each once; of nested ones the outer.

    An apostrophe, an inch mark and a mark that is never closed on its line quote nothing. A comma before the closing
    mark is the sentence's.
    """
    found, at = [], 0
    while at < len(text):
        stop = _closed(text, at) if _opens(text, at) else None
        if stop is None:
            at += 1
            continue
        found.append(text[at + 1 : stop].strip().removesuffix(","))
        at = stop + 1
    return tuple(dict.fromkeys(filter(None, found)))


def last_opened(text: str) -> int | None:
    """Returns where the last quotation mark stands that is open at the end of the text's last line."""
    opened, at = None, text.rfind("\n") + 1
    while at < len(text):
        if _opens(text, at):
            stop = _closed(text, at)
            if stop is not None:
                at = stop + 1
                continue
            opened = at
        at += 1
    return opened


class QuoteGuard:
    """Keeps the spelling of protected strings in one row while it is decoded.

    As soon as the text ends in an opened quotation whose first letters are those of a protected string, in whatever
    case, the model is made to write the rest of that string and the mark that closes it. Which strings are quoted,
    and where, stays the model's choice: a quotation that begins otherwise is left alone, and `missing` tells in the end
    which strings were never written. The tokens pass through the same decode as any others.

    Args:
        strings: what is protected.
        decode, encode: token ids <-> text, of the VLM's tokenizer.
    """

    def __init__(
        self,
        strings: Sequence[str],
        decode: Callable[[list[int]], str],
        encode: Callable[[str], list[int]],
    ) -> None:
        self.strings, self.decode, self.encode = tuple(strings), decode, encode

    def missing(self, text: str) -> list[str]:
        """Returns the protected strings that the text does not hold letter by letter."""
        return [string for string in self.strings if string not in text]

    def forced(self, ids: list[int], proposed: int) -> list[int]:
        """Returns the tokens to write instead of the proposed one; none where it may stand."""
        if not self.strings:
            return []
        now = self.decode(ids)
        text = self.decode([*ids, proposed])
        opened = last_opened(text)
        if opened is None or not text.startswith(now[:opened]):
            return []
        quotation = text[opened + 1 :]
        begun = quotation.lstrip()
        string = self._nearest(begun, now)
        if string is None:
            return []
        space = quotation[: len(quotation) - len(begun)]
        wanted = text[: opened + 1] + space + string + MARKS[text[opened]][0]
        return self._tokens(ids, wanted)

    def _nearest(self, begun: str, now: str) -> str | None:
        """The string that this quotation begins; among several one that is still to be written."""
        if not begun:
            return None
        lower = begun.casefold()
        fitting = [s for s in self.strings if s.casefold().startswith(lower) or lower.startswith(s.casefold())]
        missing = self.missing(now)
        return min(fitting, key=lambda s: (s not in missing, self.strings.index(s)), default=None)

    def _tokens(self, ids: list[int], wanted: str) -> list[int]:
        """Tokens that make the text so far the wanted one; none where the tokenizer has no such tokens."""
        whole = len(ids)
        while whole and self.decode(ids[:whole]).endswith(BROKEN):  # the first bytes of a letter are written already
            whole -= 1
        start = self.decode(ids[:whole])
        if not wanted.startswith(start):
            return []
        rest = wanted[len(start) :]
        for anchor in ("", start[-1:]):  # some tokenizers put a space before what they take for the first word
            tokens = self.encode(anchor + rest)[len(self.encode(anchor)) if anchor else 0 :]
            written, more = ids[whole:], tokens[len(ids) - whole :]
            if more and tokens[: len(written)] == written and self.decode(ids + more) == wanted:
                return more
        return []


def _opens(text: str, at: int) -> bool:
    mark = text[at]
    if mark not in MARKS:
        return False
    return mark not in AMBIGUOUS or at == 0 or not LETTER.match(text[at - 1])


def _closed(text: str, at: int) -> int | None:
    """Where the quotation that opens here closes, on the same line."""
    for match in ENDS[text[at]].finditer(text, at + 1, at + 1 + LONGEST):
        i = match.start()
        if text[i] == "\n":
            return None
        if text[i] == "'" and text[i - 1] == " ":  # this one opens; the first was an apostrophe
            return None
        if text[i] not in AMBIGUOUS or not LETTER.match(text[i + 1 : i + 2]):
            return i
    return None
