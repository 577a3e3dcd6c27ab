"""Every word of the micro-world, gathered from its tables: the micro VLM's tokenizer knows these and no others."""

from __future__ import annotations

import re

from . import phrases
from .caption import NUMBERS, POSITIONS
from .scene import BACKGROUNDS, COLORS, COLUMNS, ROWS, SHAPES, SIZES

WORD_PATTERN = r"[\w\-]+|[^\w\s]"


def words() -> list[str]:
    """All words in a fixed order: the table's first, then those of phrases and patterns."""
    texts: list[str] = [*SHAPES, *COLORS, *SIZES, *BACKGROUNDS, *POSITIONS, *NUMBERS, ", : . ?", phrases.EXTRA_WORDS]
    texts += [*phrases.PLURALS.values(), *(name for names in (ROWS, COLUMNS) for row in names.values() for name in row)]
    tables = (
        phrases.SHAPE_FACTS,
        phrases.COLOR_FACTS,
        phrases.BACKGROUND_FACTS,
        phrases.COUNT_FACTS,
        phrases.SIZE_WORDS,
        phrases.RELATIONS,
        phrases.SCENE_PATTERNS,
        phrases.CAPTION_PATTERNS,
        phrases.COMPOSE_PATTERNS,
        *phrases.EDIT_PATTERNS.values(),
    )
    texts += [text for table in tables for group in table.values() for text in group]
    plain = (re.sub(r"\{\w+\}", " ", text) for text in texts)
    return list(dict.fromkeys(word for text in plain for word in re.findall(WORD_PATTERN, text)))
