"""Two folders of pictures → one HTML page that asks people which they like better, without a server.

The page holds everything, fetches nothing, and does not say which picture is whose; `ab_votes` reads what it saves.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..conditioning.vlm import load_image
from ..files import replacing
from .pictures import SUFFIXES, Progress

TEMPLATE = Path(__file__).with_suffix(".html")
QUESTIONS = ("Which picture is better?",)
MOST_SIDE = 1024  # px
LOSSLESS = 400_000  # bytes, up to which a picture goes in as PNG
QUALITY = 92


@dataclass(frozen=True)
class Pair:
    """Two pictures of the same prompt, and for an edit the picture before it."""

    id: str
    a: Path
    b: Path
    prompt: str = ""
    source: Path | None = None


def find_pairs(
    a: str | Path, b: str | Path, prompts: Mapping[str, str] | None = None, sources: str | Path | None = None
) -> tuple[list[Pair], list[str]]:
    """Pairs the pictures of two folders by name; also returns the names that only one of them has.

    Args:
        prompts: by id; a picture ID-2 belongs to the prompt ID.
        sources: folder of the pictures before the edit, named as the pairs or their prompts.
    Raises:
        ValueError: a missing folder, one with two pictures of a name, or no name that both have; a pair without its
            prompt or source where these were given.
    """
    left, right = _by_name(Path(a)), _by_name(Path(b))
    names = sorted(set(left) & set(right), key=_in_order)
    if not names:
        raise ValueError(f"{a} and {b} have no picture of the same name, such as 0-1.png in both")
    before = _by_name(Path(sources)) if sources else {}
    pairs = []
    for name in names:
        ids = (name, name.rpartition("-")[0], name.rpartition("_")[0])
        prompt = next(((prompts or {})[i] for i in ids if i in (prompts or {})), None)
        source = next((before[i] for i in ids if i in before), None)
        if prompts is not None and prompt is None:
            raise ValueError(f"pair {name!r}: none of the {len(prompts)} prompts is its own")
        if sources and source is None:
            raise ValueError(f"pair {name!r}: {sources} holds no picture of that name")
        pairs.append(Pair(name, left[name], right[name], prompt or "", source))
    return pairs, sorted(set(left) ^ set(right), key=_in_order)


def write_page(
    path: str | Path,
    pairs: Sequence[Pair],
    *,
    names: tuple[str, str] = ("A", "B"),
    questions: Sequence[str] = QUESTIONS,
    title: str = "Which picture is better?",
    seed: int = 0,
    most_side: int = MOST_SIDE,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes the page.

    Sides and order are drawn by the seed, the voter's name and the pair, so that they differ from voter to voter and
    come again when one goes on. Pictures above `most_side` px are shrunk; those above 400 kB as PNG go in as JPEG of
    quality 92 without colour subsampling, both of a pair alike.

    Args:
        names: of the two methods; written into the votes, never shown.
        questions: asked of each pair in turn, such as one for the picture and one for the likeness.
    Returns:
        The file, its size in bytes, the study's id, and the pairs' ids.
    Raises:
        ValueError: no pair, no question, equal names, or a file that is not a picture.
    """
    path = Path(path)
    if not pairs or not questions or not all(question.strip() for question in questions):
        raise ValueError("a page needs at least one pair and one question")
    if len(set(names)) != 2 or not all(names):
        raise ValueError(f"names {names[0]!r}, {names[1]!r}: expected two different ones")
    shown = []
    for number, pair in enumerate(pairs):
        entry = {"id": pair.id, "prompt": pair.prompt, **_embedded(pair, most_side)}
        shown.append(entry)
        if progress:
            progress("embedding", number + 1, len(pairs))
    arms = dict(zip("ab", names, strict=True))
    content = {"title": title, "seed": seed, "arms": arms, "questions": list(questions), "pairs": shown}
    study = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    data = json.dumps({"study": study, **content}, ensure_ascii=False).replace("<", "\\u003c")
    before, after = TEMPLATE.read_text(encoding="utf-8").split("@DATA@")
    with replacing(path) as temporary:
        temporary.write_text(before + data + after, encoding="utf-8")
    return {
        "page": str(path),
        "bytes": path.stat().st_size,
        "study": study,
        "names": list(names),
        "questions": list(questions),
        "pairs": [pair.id for pair in pairs],
    }


def _embedded(pair: Pair, most_side: int) -> dict[str, str]:
    """The pictures as data URLs; those of the two methods in the same format, which must not tell them apart."""
    a, b = (_shrunk(load_image(path), most_side) for path in (pair.a, pair.b))
    lossless = [_encoded(image, "PNG") for image in (a, b)]
    if max(map(len, lossless)) > LOSSLESS:
        found = dict(zip("ab", (_url(_encoded(image, "JPEG"), "jpeg") for image in (a, b)), strict=True))
    else:
        found = dict(zip("ab", (_url(data, "png") for data in lossless), strict=True))
    if pair.source:
        found["source"] = _url(_encoded(_shrunk(load_image(pair.source), most_side), "JPEG"), "jpeg")
    return found


def _shrunk(image: Image.Image, most_side: int) -> Image.Image:
    image = image.copy()
    image.thumbnail((most_side, most_side), Image.Resampling.LANCZOS)
    return image


def _encoded(image: Image.Image, kind: str) -> bytes:
    data = io.BytesIO()
    options = {"quality": QUALITY, "subsampling": 0} if kind == "JPEG" else {"optimize": True}
    image.save(data, format=kind, **options)
    return data.getvalue()


def _url(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _by_name(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of pictures")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            if path.stem in found:
                raise ValueError(f"{path}: another picture there is named {found[path.stem].name}; keep one")
            found[path.stem] = path
    return found


def _in_order(name: str) -> tuple[int, str]:
    return len(name), name
