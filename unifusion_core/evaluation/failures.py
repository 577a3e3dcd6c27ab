"""The pictures that did worst, on contact sheets: each over the questions that it fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from .charts import FADED, INK, LABEL, SCALE, SMALL, TITLE, WIDTH, Canvas, Color, length
from .dpg_scores import Question
from .pictures import Picture

COLUMNS, PER_SHEET = 3, 12
MARGIN, GAP, HEAD = 24, 22, 64  # px
LINE, LINES = 17, 14  # px; most lines of questions under a picture
CELL = (WIDTH - 2 * MARGIN - (COLUMNS - 1) * GAP) // COLUMNS
RED, BLUE = (186, 52, 42), (44, 92, 160)
MARKS: dict[str, tuple[str, Color]] = {"failed": ("no: ", RED), "failed_by_parent": ("parent failed: ", FADED)}
MARKS["undecided"] = ("undecided: ", BLUE)

Line = tuple[str, Color]


@dataclass(frozen=True, eq=False)
class Failure:
    """One picture, what to call it, and lines about what it lacks."""

    picture: Picture
    title: str
    lines: tuple[Line, ...]


def worst(
    report: Mapping[str, Any],
    questions: Mapping[str, Sequence[Question]],
    pictures: Mapping[str, Sequence[Picture]],
    count: int,
) -> list[Failure]:
    """The `count` pictures of a report of `dpg_bench.evaluate` with the lowest share of questions that hold."""
    found = []
    for item, results in report["prompts"].items():
        texts = {question.number: question.text for question in questions[item]}
        for picture, result in zip(pictures[item], results, strict=True):
            lines = tuple(
                (mark + texts[number], color) for key, (mark, color) in MARKS.items() for number in result[key]
            )
            title = f"{picture.name}: {result['held']} of {len(texts)}"
            found.append((result["held"] / len(texts), item, Failure(picture, title, lines)))
    failing = [entry for entry in found if entry[2].lines]
    return [failure for *_, failure in sorted(failing, key=lambda entry: entry[:2])[:count]]


def sheets(failures: Sequence[Failure], title: str) -> list[Image.Image]:
    """Lays failures out on pages of `PER_SHEET`, 1024 px wide."""
    pages = [failures[start : start + PER_SHEET] for start in range(0, len(failures), PER_SHEET)]
    return [_sheet(page, f"{title} ({number + 1} of {len(pages)})") for number, page in enumerate(pages)]


def _sheet(failures: Sequence[Failure], title: str) -> Image.Image:
    cells = [_cell(failure) for failure in failures]
    rows = [cells[start : start + COLUMNS] for start in range(0, len(cells), COLUMNS)]
    heights = [max(image.height for image, _, _ in row) + 34 + LINE * max(len(row[2]) for row in row) for row in rows]
    canvas = Canvas(HEAD + sum(heights) + GAP * len(rows))
    canvas.text(WIDTH / 2, 38, title, TITLE, anchor="ms")
    y = float(HEAD)
    for row, height in zip(rows, heights, strict=True):
        tall = max(image.height for image, _, _ in row)
        for column, (image, name, lines) in enumerate(row):
            x = MARGIN + column * (CELL + GAP)
            large = image.resize((image.width * SCALE, image.height * SCALE), Image.Resampling.LANCZOS)
            canvas.image.paste(large, (round(x * SCALE), round(y * SCALE)))
            canvas.text(x, y + tall + 20, name, LABEL, INK)
            for number, (line, color) in enumerate(lines):
                canvas.text(x, y + tall + 40 + LINE * number, line, SMALL, color)
        y += height + GAP
    return canvas.finish()


def _cell(failure: Failure) -> tuple[Image.Image, str, list[Line]]:
    image = failure.picture.load()
    scale = CELL / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    how = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    lines = [(line, color) for text, color in failure.lines for line in _wrapped(text)]
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], ("...", FADED)]
    return image.resize(size, how), _fitting(failure.title, LABEL), lines


def _wrapped(text: str) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and length(f"{lines[-1]} {word}", SMALL) <= CELL:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return [_fitting(line, SMALL) for line in lines]


def _fitting(text: str, size: int) -> str:
    while text and length(text, size) > CELL:
        text = text[:-4] + "..." if len(text) > 4 else ""
    return text
