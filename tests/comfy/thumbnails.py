"""Thumbnails of workflows, put together from the pictures that they make, or of the graphs themselves."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .canvas import Page
from .client import Client
from .server import Server
from .ui_to_api import NOTES, to_api

OPENER = Path(__file__).parent / "browser" / "workflows.mjs"

SIDE, MARGIN, GAP, WORD = 480, 16, 12, 24  # px; WORD is the height of a label
HEAD = 72  # px under which the template browser writes "Node graph"
BACKDROP, INK, FRAME = (246, 245, 241), (60, 60, 60), (205, 203, 196)

Cell = tuple[Image.Image, str]


def pictures(client: Client, page: Page, workflow: Mapping[str, Any]) -> list[list[Cell]]:
    """Runs the workflow; the pictures its thumbnail shows, with their labels, in rows."""
    prompt = to_api(workflow, page.infos)
    for row in page.thumbnail:
        for one in row:
            prompt[f"look{one.box.id}"] = {"class_type": "PreviewImage", "inputs": {"images": [str(one.box.id), 0]}}
    result = client.run(prompt).check()
    return [
        [
            (Image.fromarray(pixels), one.label if index == 0 else "")
            for one in row
            for index, pixels in enumerate(result.images(f"look{one.box.id}"))
        ]
        for row in page.thumbnail
    ]


def graph(server: Server, name: str, page: Page) -> list[list[Cell]]:
    """The template `name` as the frontend shows it, under the heading of its note."""
    heading = next(box for box in page.boxes if box.kind in NOTES).values["text"].partition("\n")[0].removeprefix("## ")
    with tempfile.TemporaryDirectory() as folder:
        options = ["--graph", "--shots", folder, "--only", name]
        subprocess.run(["node", str(OPENER), f"http://{server.address}", *options], check=True, capture_output=True)
        with Image.open(Path(folder) / f"{name}.png") as picture:
            return [[(picture.convert("RGB"), heading)]]


def compose(rows: Sequence[Sequence[Cell]]) -> Image.Image:
    """A square with the pictures as large as they can be, in rows; a picture alone fills it."""
    if len(rows) == 1 and len(rows[0]) == 1 and not rows[0][0][1]:
        return rows[0][0][0].convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    sheet = Image.new("RGB", (SIDE, SIDE), BACKDROP)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=17)
    words = [WORD if any(label for _, label in row) else 0 for row in rows]
    spent = sum(words) + GAP * (len(rows) - 1)
    heights = _heights(rows, SIDE - HEAD - MARGIN - spent)
    y = HEAD + (SIDE - HEAD - MARGIN - spent - sum(heights)) / 2
    for row, height, word in zip(rows, heights, words, strict=True):
        widths = [height * picture.width / picture.height for picture, _ in row]
        whole = sum(widths) + GAP * (len(row) - 1)
        shared = len(row) > 1 and not any(label for _, label in row[1:])
        x = (SIDE - whole) / 2
        for (picture, label), width in zip(row, widths, strict=True):
            _paste(sheet, draw, picture, (round(x), round(y), round(x + width), round(y + height)))
            draw.text((SIDE / 2 if shared else x + width / 2, y + height + 3), label, INK, font, anchor="ma")
            x += width + GAP
        y += height + word + GAP
    return sheet


def contact_sheet(files: Sequence[Path], columns: int = 4) -> Image.Image:
    thumbnails = [Image.open(file) for file in files]
    rows = -(-len(thumbnails) // columns)
    sheet = Image.new("RGB", (columns * (SIDE + GAP), rows * (SIDE + GAP)), "white")
    for index, thumbnail in enumerate(thumbnails):
        sheet.paste(thumbnail, (index % columns * (SIDE + GAP), index // columns * (SIDE + GAP)))
    return sheet


def _paste(sheet: Image.Image, draw: ImageDraw.ImageDraw, picture: Image.Image, box: tuple[int, ...]) -> None:
    left, top, right, bottom = box
    sheet.paste(picture.convert("RGB").resize((right - left, bottom - top), Image.Resampling.LANCZOS), (left, top))
    draw.rectangle((left - 1, top - 1, right, bottom), outline=FRAME)


def _heights(rows: Sequence[Sequence[Cell]], room: float) -> list[float]:
    """As high as the width allows, then shrunk together to the height that there is."""
    wide = [
        (SIDE - 2 * MARGIN - GAP * (len(row) - 1)) / sum(picture.width / picture.height for picture, _ in row)
        for row in rows
    ]
    least = room / len(rows)
    capped = np.minimum(wide, max(least, room - sum(min(least, one) for one in sorted(wide)[:-1])))
    return list(capped * min(1.0, room / capped.sum()))
