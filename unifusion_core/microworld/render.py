"""Scenes → pictures, by signed distances with analytic antialiasing, in numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from .scene import BACKGROUNDS, CELL, COLORS, SHAPES, SIZES, STRIPES, Scene, Thing

STRIPE_PERIOD = 5.0  # px
STRIPE_DARKNESS = 0.45
MARK_RADIUS = 1.4  # px: under one pixel of a thumbnail at half size
MARK_OFFSET = 0.27  # of the shape's radius, along both axes
MARK_COLOR = 12.0

_AXIS = np.arange(CELL, dtype=np.float32) + 0.5 - CELL / 2
_Y, _X = np.meshgrid(_AXIS, _AXIS, indexing="ij")


def render(scene: Scene) -> Image.Image:
    """One scene as an RGB image of `scene.size`."""
    return Image.fromarray(render_array(scene))


def render_array(scene: Scene) -> np.ndarray:
    """One scene as [H, W, 3] uint8."""
    canvas = np.empty((scene.rows * CELL, scene.columns * CELL, 3), np.float32)
    canvas[:] = BACKGROUNDS[scene.background]
    paint(canvas, scene.things)
    return np.rint(canvas).astype(np.uint8)


def render_batch(scenes: Sequence[Scene]) -> np.ndarray:
    """Scenes of one canvas size as [B, H, W, 3] uint8."""
    return np.stack([render_array(scene) for scene in scenes])


def paint(canvas: np.ndarray, things: Sequence[Thing]) -> None:
    """Paints things over a float canvas, in place."""
    for thing in things:
        cover, color = thing_layers(thing)
        y, x = thing.row * CELL, thing.column * CELL
        patch = canvas[y : y + CELL, x : x + CELL]
        patch += cover[..., None] * (color - patch)


def thing_layers(thing: Thing) -> tuple[np.ndarray, np.ndarray]:
    """The coverage [32, 32] in 0..1 and the colour [32, 32, 3] of a thing within its cell."""
    detail, radius = thing.detail, SIZES[thing.size]
    x, y = _X - np.float32(detail.dx), _Y - np.float32(detail.dy)
    cover = np.clip(0.5 - distance(thing.shape, x, y, radius, detail.rotation), 0.0, 1.0)
    light = np.full((CELL, CELL), detail.shade, np.float32)
    if detail.stripes != STRIPES[0]:
        along = y if detail.stripes == "horizontal" else x
        wave = np.clip(1.5 * np.sin(along * np.float32(2 * np.pi / STRIPE_PERIOD)), -1.0, 1.0)
        light *= 1.0 - STRIPE_DARKNESS * (0.5 + 0.5 * wave)
    color = light[..., None] * np.asarray(COLORS[thing.color], np.float32)
    if detail.mark != "none":
        down, right = detail.mark.split("-")
        shift = np.float32(MARK_OFFSET * radius)
        mark_y = y - (shift if down == "lower" else -shift)
        mark_x = x - (shift if right == "right" else -shift)
        dot = np.clip(0.5 + MARK_RADIUS - np.hypot(mark_x, mark_y), 0.0, 1.0)
        color += dot[..., None] * (MARK_COLOR - color)
    return cover, color


def distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float, rotation: float) -> np.ndarray:
    """Signed distance in px to a shape centred at the origin (y points down), negative inside."""
    angle = np.deg2rad(rotation)
    c, s = np.float32(np.cos(angle) / radius), np.float32(np.sin(angle) / radius)
    u, v = c * x + s * y, c * y - s * x
    return _UNIT_SHAPES[shape](u, v) * np.float32(radius)


def _circle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.hypot(u, v) - 0.98


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v)) - 0.84


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(v, np.float32(np.sqrt(0.75)) * np.abs(u) - 0.5 * v) - 0.6


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v = np.abs(u), np.abs(v)
    return np.maximum(np.minimum(u, v) - 0.36, np.maximum(u, v) - 1.05)


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # Folded into the wedge of half a point there is one edge, from the tip (0, R) to the notch at angle pi/5.
    length, half_point = np.hypot(u, v), np.pi / 5
    angle = np.abs((np.arctan2(u, -v) + half_point) % (2 * half_point) - half_point)
    tip, notch = 1.22, 0.56
    edge_u, edge_v = notch * np.sin(half_point), notch * np.cos(half_point) - tip
    normal = np.asarray((-edge_v, edge_u)) / np.hypot(edge_u, edge_v)
    return (length * np.sin(angle) * normal[0] + (length * np.cos(angle) - tip) * normal[1]).astype(np.float32)


def _heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # A square on its corner with a disc on each of the two upper sides; the shift puts the centroid at the origin.
    half = 0.60
    u, v = np.abs(u), v - 0.265
    a, b = (u + v) * np.float32(np.sqrt(0.5)), (v - u) * np.float32(np.sqrt(0.5))
    square = np.maximum(np.abs(a), np.abs(b)) - half
    side = half * np.float32(np.sqrt(0.5))
    disc = np.hypot(u - side, v + side) - half
    return np.minimum(square, disc)


_UNIT_SHAPES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "heart": _heart,
}
assert tuple(_UNIT_SHAPES) == SHAPES
