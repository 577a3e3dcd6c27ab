"""Any image file -> RGB -> a grid of square tiles (row-major) and a thumbnail, and where each token lies.

Paper: Sec. 2.2, Fig. 5 (up to 10 views of a picture; here 9 tiles + 1 thumbnail).
"""

from __future__ import annotations

import math
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 50_000_000
MAX_SIDE = 16_384
MIN_SIDE = 8

# what Pillow raises on broken data, format by format
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)


def check_size(width: int, height: int, name: str = "image") -> None:
    """Raises ValueError unless both sides are 8 to 16384 px and the area is at most 50 megapixels."""
    if min(width, height) < MIN_SIDE or max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise ValueError(
            f"{name} is {width}x{height} px; accepted are sides of {MIN_SIDE} to {MAX_SIDE} px "
            f"and at most {MAX_PIXELS // 1_000_000} megapixels"
        )


def load_image(path: str | Path) -> Image.Image:
    """Reads a picture file as upright 8-bit RGB.

    Takes what Pillow reads: palette, grey, 16-bit, CMYK and transparent pictures (laid over white), EXIF-rotated ones;
    of an animation the first frame.

    Raises:
        ValueError: no such file, not an image, truncated or damaged, or outside `check_size`'s limits. One line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such image file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
    except Image.DecompressionBombError:
        raise ValueError(f"{path}: too large; at most {MAX_PIXELS // 1_000_000} megapixels are accepted") from None
    except _BROKEN as error:
        raise ValueError(f"{path}: not an image that can be read ({_one_line(error)})") from None
    with image:
        check_size(*image.size, name=str(path))
        try:
            image.load()
            return as_rgb(ImageOps.exif_transpose(image))
        except _BROKEN as error:
            raise ValueError(f"{path}: damaged or unsupported image ({_one_line(error)})") from None


def as_rgb(image: Image.Image) -> Image.Image:
    """Converts any Pillow image to 8-bit RGB, transparency laid over white.

    Raises:
        ValueError: a size outside `check_size`'s limits, or a 32-bit float image, whose range is not defined.
    """
    check_size(*image.size)
    if image.mode == "F":
        raise ValueError("a 32-bit float image has no fixed range; save it with 8 or 16 bits per channel")
    if image.mode == "I" or image.mode.startswith("I;16"):
        deep = np.asarray(image).astype(np.float64)
        image = Image.fromarray(np.clip(np.rint(deep / 257), 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def check_grid(grid: tuple[int, int]) -> tuple[int, int]:
    """Returns (rows, cols) as integers; ValueError unless both are at least 1."""
    if len(grid) != 2 or any(int(n) != n or n < 1 for n in grid):
        raise ValueError(f"grid {grid!r}: expected (rows, cols), both whole numbers of at least 1")
    return int(grid[0]), int(grid[1])


def choose_grid(width: int, height: int, tile: int, max_tiles: int) -> tuple[int, int]:
    """Returns the (rows, cols) of 1 to `max_tiles` tiles whose aspect ratio is closest to the picture's.

    Among equally close grids the larger wins as long as the picture has more than half the pixels of its canvas.
    This is InternVL's own rule, so the frozen VLM sees what it was trained on.
    """
    if max_tiles < 1:
        raise ValueError(f"max_tiles {max_tiles}: expected at least 1")
    grids = [(rows, cols) for cols in range(1, max_tiles + 1) for rows in range(1, max_tiles // cols + 1)]
    best, closest = (1, 1), math.inf
    for rows, cols in sorted(grids, key=math.prod):
        gap = abs(width / height - cols / rows)
        if gap < closest or (gap == closest and width * height > 0.5 * tile * tile * rows * cols):
            best, closest = (rows, cols), gap
    return best


def fit_tokens(width: int, height: int, unit: int, least: int, most: int) -> tuple[int, int]:
    """Returns the (rows, cols) of `unit` px that keep a picture's aspect ratio and resolution best.

    Sides are rounded to `unit`; a picture of more than `most` or fewer than `least` units is scaled. This is Qwen-VL's
    own rule, except that a very long strip is squeezed rather than let past `most`.
    """
    if not 1 <= least <= most:
        raise ValueError(f"least {least} and most {most}: expected 1 <= least <= most")
    rows, cols = round(height / unit), round(width / unit)
    if rows * cols > most:
        shrink = math.sqrt(width * height / (most * unit**2))
        rows, cols = (max(1, math.floor(side / shrink / unit)) for side in (height, width))
    elif rows * cols < least:
        grow = math.sqrt(least * unit**2 / (width * height))
        rows, cols = (math.ceil(side * grow / unit) for side in (height, width))
    return (rows, min(cols, most // rows)) if rows <= cols else (min(rows, most // cols), cols)


def split(
    image: Image.Image,
    grid: tuple[int, int],
    tile: int | tuple[int, int],
    resample: Image.Resampling | int = Image.Resampling.BICUBIC,
) -> list[Image.Image]:
    """Cuts a picture, stretched to the canvas, into tiles of `tile` px (a side, or height and width).

    A thumbnail follows unless the grid is 1x1.
    """
    rows, cols = check_grid(grid)
    height, width = (tile, tile) if isinstance(tile, int) else tile
    canvas = image.resize((cols * width, rows * height), resample)
    corners = [(col * width, row * height) for row in range(rows) for col in range(cols)]
    tiles = [canvas.crop((x, y, x + width, y + height)) for x, y in corners]
    return tiles if rows * cols == 1 else [*tiles, image.resize((width, height), resample)]


def token_positions(grid: tuple[int, int], side: int | tuple[int, int]) -> np.ndarray:
    """Returns (1, y, x) for each token of `split`'s tiles, `side` x `side` (or rows x cols) tokens in each.

    Returns:
        [tiles * tokens of a tile, 3] float32; y and x are the token centre as a fraction of the source picture.
    """
    rows, cols = check_grid(grid)
    down, across = ((np.arange(n) + 0.5) / n for n in ((side, side) if isinstance(side, int) else side))

    def view(top: float, left: float, height: float, width: float) -> np.ndarray:
        y, x = np.meshgrid(top + down * height, left + across * width, indexing="ij")
        return np.stack([np.ones_like(y), y, x], axis=-1).reshape(-1, 3)

    views = [view(row / rows, col / cols, 1 / rows, 1 / cols) for row in range(rows) for col in range(cols)]
    if rows * cols > 1:
        views.append(view(0, 0, 1, 1))
    return np.concatenate(views).astype(np.float32)


@dataclass(frozen=True)
class Layout:
    """How one picture is cut: `grid` (rows, cols) of tiles of `size` (height, width) px, a thumbnail of that size last.

    `side` is (rows, cols) of the tokens of each. A grid of 1x1 is the whole picture, and has no thumbnail.
    """

    grid: tuple[int, int]
    size: tuple[int, int]
    side: tuple[int, int]

    @property
    def num_tiles(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_views(self) -> int:
        """Tiles and thumbnail."""
        return self.num_tiles + (self.num_tiles > 1)

    @property
    def tokens_per_view(self) -> int:
        return self.side[0] * self.side[1]

    @property
    def num_tokens(self) -> int:
        return self.num_views * self.tokens_per_view

    def views(self) -> Iterator[tuple[Literal["image", "thumbnail"], int | None, np.ndarray]]:
        """Yields kind, tile number and token positions [tokens, 3] of each view, tiles in row-major order."""
        positions = np.split(token_positions(self.grid, self.side), self.num_views)
        for i, centres in enumerate(positions):
            yield ("image", i, centres) if i < self.num_tiles else ("thumbnail", None, centres)

    def cut(self, image: Image.Image, resample: Image.Resampling | int) -> list[Image.Image]:
        """Returns the pictures of `views`."""
        return split(image, self.grid, self.size, resample)


def to_array(image: Image.Image, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """Returns an RGB image as [3, h, w] float32, scaled to 0..1 and then normalised."""
    pixels = np.asarray(image, dtype=np.float32) / 255
    return ((pixels - np.float32(mean)) / np.float32(std)).transpose(2, 0, 1)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
