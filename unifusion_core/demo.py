"""The main job on the embedded model, for the eye: pictures, one labelled contact sheet, and `demo.json`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from .conditioning.vlm import Request
from .files import save_json, save_png
from .microworld.caption import parse_caption
from .microworld.render import render
from .microworld.scene import Scene, sample_detail, sample_scene
from .pipeline import UniFusion

SCALE, LARGE = 3, 384  # of a picture on the contact sheet; the most it may measure there, in px
SHEET_WIDTH, MARGIN, GAP, CELL_WIDTH = 1720, 28, 18, 240  # px; four edits fit, or four of 384 px
BACKDROP, INK, FADED, ACCENT = (246, 245, 241), (25, 25, 25), (105, 105, 105), (30, 90, 160)
LINE = 19  # px
REWRITE_LINES = 7  # of VERIFI's text on the sheet; demo.json has all of it

TEXT = "Text to image"
REASONING = "Prompts that need thought: VERIFI works them out (grey: what it wrote)"
EDITS = "Edits (left: the source)"
ZERO_SHOT = "Edits by a model that never saw one: image tokens for the first share of the steps, then the rewrite"
RECONSTRUCTION = "A 192-px picture drawn again from its image tokens alone"
REFERENCES = "Two references composed (never trained)"


@dataclass(frozen=True, kw_only=True)
class Item:
    """One picture of the demo; `sources` name pictures of `sources()`. `label` is printed under it on the sheet."""

    name: str
    section: str
    prompt: str
    model: str = "micro"
    sources: tuple[str, ...] = ()
    schedule: str | None = None
    grid: tuple[int, int] | None = None
    rewriting: bool = True
    guidance: float | None = None
    size: tuple[int, int] = (64, 64)
    label: str = ""


def sources() -> dict[str, Scene]:
    """The scenes that are edited, drawn again and composed, each with details that no caption names."""
    captions = {
        "day": "two shapes on a beige background : a large yellow star at top-left , a small red heart at bottom-right",
        "dusk": "three shapes on a gray background : a large blue circle at top-right , a small orange square at "
        "bottom-left , a large purple triangle at bottom-right",
    }
    scenes = {name: _detailed(parse_caption(caption), name) for name, caption in captions.items()}
    return {**scenes, "crowd": sample_scene(Random("demo crowd"), rows=6, columns=6, count=14)}


def items() -> tuple[Item, ...]:
    prompts = {
        TEXT: {
            "text_caption": "two shapes on a gray background : a small yellow star at top-left , a large red heart at "
            "bottom-right",
            "text_sentence": "draw a large green square at top-right on a white background",
            "text_terse": "blue circle , pink heart , black background",
            "text_unseen_pair": "a purple star and a small red circle on a white background",
        },
        REASONING: {
            "reason_indirect": "the shape with three sides in the color of grass at top-left and a heart",
            "reason_mixture": "a star in the color of red mixed with white on a background in the color of coal",
            "reason_count": "two plus one blue squares on a white background",
            "reason_fact": "as many yellow crosses as a car has wheels",
            "reason_relation": "a red square left of a blue circle on a gray background",
        },
    }
    edits = {
        "edit_recolor": ("make the star blue", "day"),
        "edit_remove": ("remove the red heart", "day"),
        "edit_move": ("move the star to top-right", "day"),
        "edit_background": ("make the background the color of coal", "day"),
        "edit_add": ("add a small pink heart at top-left", "dusk"),
        "edit_reshape": ("turn the circle into the shape that stands for love", "dusk"),
        "edit_resize": ("make the orange square large", "dusk"),
    }
    shares = {"0": "text:0-1", "0.15": "image:0-0.15, text:0.15-1", "1": "image:0-1"}
    grids = {1: (1, 1), 4: (2, 2), 9: (3, 3)}
    return (
        *(Item(name=n, section=section, prompt=p) for section, row in prompts.items() for n, p in row.items()),
        *(Item(name=n, section=EDITS, prompt=p, sources=(source,)) for n, (p, source) in edits.items()),
        *(
            Item(
                name=f"zeroshot_{share}",
                section=ZERO_SHOT,
                prompt="make the star blue",
                model="micro-base",
                sources=("day",),
                schedule=schedule,
                label=schedule,
            )
            for share, schedule in shares.items()
        ),
        *(
            Item(
                name=f"reconstruction_{tiles}",
                section=RECONSTRUCTION,
                prompt="show this again",
                sources=("crowd",),
                schedule="image:0-1",
                grid=grid,
                rewriting=False,
                guidance=1.0,
                size=(192, 192),
                label=f"{tiles} {'tile' if tiles == 1 else 'tiles and a thumbnail'}",
            )
            for tiles, grid in grids.items()
        ),
        Item(
            name="references_two",
            section=REFERENCES,
            prompt="combine the star from image one with the blue circle from image two",
            sources=("day", "dusk"),
        ),
    )


def run(
    load_model: Callable[[str], UniFusion],
    out: Path,
    *,
    seed: int = 0,
    steps: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Makes every picture, the contact sheet and `demo.json` in the folder `out`.

    Args:
        load_model: name → model; asked for "micro" and "micro-base".
        steps: None: the model's own number.
        progress: called with (name of a picture, pictures done, pictures in all).
    Returns:
        What demo.json holds; file names are relative to `out`, times in seconds.
    """
    start = time.perf_counter()
    out = Path(out)
    load_model = cache(load_model)
    references = {name: render(scene) for name, scene in sources().items()}
    for name, image in references.items():
        save_png(out / f"source_{name}.png", image)
    pictures, shown = [], []
    todo = items()
    for number, item in enumerate(todo):
        given = tuple(references[name] for name in item.sources)
        image, record = _draw(load_model(item.model), item, given, seed, steps)
        save_png(out / record["file"], image, record)
        pictures.append(record)
        shown.append((item, record, (*given, image)))
        if progress:
            progress(item.name, number + 1, len(todo))
    save_png(out / "contact_sheet.png", contact_sheet(shown))
    report = {
        "seed": seed,
        "pictures": pictures,
        "sources": [f"source_{name}.png" for name in references],
        "contact_sheet": "contact_sheet.png",
        "seconds": time.perf_counter() - start,
    }
    save_json(out / "demo.json", report)
    return report


def _draw(
    model: UniFusion, item: Item, images: tuple[Image.Image, ...], seed: int, steps: int | None
) -> tuple[Image.Image, dict[str, Any]]:
    start = time.perf_counter()
    steps = model.spec.steps if steps is None else steps
    guidance = model.spec.guidance if item.guidance is None else item.guidance
    conditions = model.prepare([Request(item.prompt, images, grid=item.grid)], rewriting=item.rewriting)
    schedule = item.schedule or f"{conditions.default_track}:0-1"
    latents = model.sample(conditions, schedule=schedule, steps=steps, guidance=guidance, seed=seed, size=item.size)
    image = model.decode(latents)[0]
    return image, {
        "file": f"{item.name}.png",
        "section": item.section,
        "prompt": item.prompt,
        "sources": [f"source_{name}.png" for name in item.sources],
        "model": item.model,
        "grid": None if item.grid is None else list(item.grid),
        "rewrite": conditions.texts[0] if conditions.texts else None,
        "token_ids": list(conditions.rewrites.token_ids[0]) if conditions.rewrites else None,
        "schedule": schedule,
        "steps": steps,
        "guidance": guidance,
        "seed": seed,
        "size": list(item.size),
        "seconds": time.perf_counter() - start,
    }


def _detailed(scene: Scene, name: str) -> Scene:
    rng = Random(f"demo {name}")
    return scene.with_things([replace(thing, detail=sample_detail(rng)) for thing in scene.things])


# The contact sheet.


@dataclass(frozen=True, eq=False)
class _Cell:
    """Pictures side by side, the last one drawn by the model, and lines of text (colour, line) under them."""

    pictures: tuple[Image.Image, ...]
    lines: tuple[tuple[tuple[int, int, int], str], ...]
    width: int
    height: int


def contact_sheet(shown: Sequence[tuple[Item, dict[str, Any], tuple[Image.Image, ...]]]) -> Image.Image:
    """Lays out (item, its record, sources and result) by section, magnified, each over its prompt and rewrite."""
    fonts = {size: ImageFont.load_default(size=size) for size in (15, 21, 30)}
    page: list[tuple[int, str | list[_Cell]]] = [(64, "UniFusion: what the embedded model draws")]
    for section, group in groupby(shown, key=lambda entry: entry[0].section):
        page.append((46, section))
        entries = list(group)
        shared = len(entries) > 1 and len({item.sources for item, _, _ in entries}) == 1
        cells = [
            _cell(pictures[-1:] if shared else pictures, item.prompt, item.label, record["rewrite"] or "", fonts[15])
            for item, record, pictures in entries
        ]
        if shared and entries[0][0].sources:
            cells = [_cell(entries[0][2][:-1], "the source", "", "", fonts[15]), *cells]
        page += [(max(cell.height for cell in row) + GAP, row) for row in _rows(cells)]
    sheet = Image.new("RGB", (SHEET_WIDTH, sum(height for height, _ in page) + MARGIN), BACKDROP)
    draw = ImageDraw.Draw(sheet)
    y = 0
    for height, content in page:
        if isinstance(content, str):
            draw.text((MARGIN, y + height - 12), content, INK, fonts[30 if y == 0 else 21], anchor="ls")
        else:
            x = MARGIN
            for cell in content:
                _paste(sheet, draw, cell, x, y, fonts[15])
                x += cell.width + GAP
        y += height
    return sheet


def _cell(
    pictures: tuple[Image.Image, ...], prompt: str, label: str, rewrite: str, font: ImageFont.FreeTypeFont
) -> _Cell:
    scales = [min(SCALE, LARGE // max(p.size)) for p in pictures]
    large = tuple(
        p.resize((p.width * scale, p.height * scale), Image.Resampling.NEAREST)
        for p, scale in zip(pictures, scales, strict=True)
    )
    width = max(CELL_WIDTH, sum(picture.width for picture in large) + GAP * (len(large) - 1))
    written = _wrapped(rewrite, font, width)
    if len(written) > REWRITE_LINES:
        written = [*written[: REWRITE_LINES - 1], "..."]
    texts = ((INK, _wrapped(prompt, font, width)), (ACCENT, _wrapped(label, font, width)), (FADED, written))
    lines = tuple((color, line) for color, part in texts for line in part)
    return _Cell(large, lines, width, max(picture.height for picture in large) + 8 + LINE * len(lines))


def _rows(cells: list[_Cell]) -> Iterator[list[_Cell]]:
    """Breaks cells into rows that fit the sheet."""
    row: list[_Cell] = []
    for cell in cells:
        if row and sum(c.width + GAP for c in row) + cell.width > SHEET_WIDTH - 2 * MARGIN:
            yield row
            row = []
        row.append(cell)
    yield row


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _paste(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, cell: _Cell, x: int, y: int, font: ImageFont.FreeTypeFont
) -> None:
    bottom = y + max(picture.height for picture in cell.pictures)
    left = x
    for number, picture in enumerate(cell.pictures):
        if number and number == len(cell.pictures) - 1:  # an arrow to the result
            middle, tip = y + picture.height // 2, left - 4
            draw.polygon(((tip, middle), (tip - 10, middle - 8), (tip - 10, middle + 8)), fill=INK)
        sheet.paste(picture, (left, y))
        draw.rectangle((left - 1, y - 1, left + picture.width, y + picture.height), outline=(200, 200, 200))
        left += picture.width + GAP
    for number, (color, line) in enumerate(cell.lines):
        draw.text((x, bottom + 8 + LINE * number), line, color, font)
