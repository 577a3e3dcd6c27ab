"""Qwen2.5-VL and Qwen3-VL (transformers' own classes): pictures of any size, rotary positions of three axes.

Qwen has no tiles: tiles and thumbnail are given as pictures of their own, each between <|vision_start|> and
<|vision_end|>. With `max_tiles=1` and no forced grid there is one picture at its own aspect ratio and resolution, as
Qwen was trained. What Qwen3-VL's DeepStack adds after its first layers is part of the states: state i is what enters
layer i.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .base import FrozenVLM
from .preprocessor import read_config, read_preprocessor
from .templates import CHATML
from .tiling import Layout, fit_tokens, to_array

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
TILE_SIDE = 16  # tokens along a tile's side, as InternVL's and Gemma's: 448 px in Qwen2.5-VL, 512 px in Qwen3-VL
MOST_TOKENS = 2560  # of a single picture: what ten tiles take


class Qwen25VL(FrozenVLM):
    """Sees a picture as up to `max_tiles` square tiles and a thumbnail of 256 tokens each, or whole."""

    family = "qwen2_5_vl"
    end_of_turn = ("<|im_end|>",)
    default_template = CHATML
    default_mean, default_std = CLIP_MEAN, CLIP_STD

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        resample: int = Image.Resampling.BICUBIC,
        tile_side: int = TILE_SIDE,
        least_pixels: int = 56 * 56,
        most_pixels: int | None = None,
        **kwargs,
    ) -> None:
        """Takes the model and its tokenizer.

        Args:
            tile_side: tokens along a tile's side. least_pixels, most_pixels: area of a picture that is seen whole.
        """
        config, vision = model.config, model.config.vision_config
        self._image_token_ids = (config.image_token_id, config.video_token_id)
        super().__init__(model, tokenizer, **kwargs)
        self.patch, self.merge, self.frames = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        self.unit = self.patch * self.merge
        self.tile_side, self.tile_size = tile_side, tile_side * self.unit
        self.least = max(1, math.ceil(least_pixels / self.unit**2))
        self.most = max(self.least, min(MOST_TOKENS, (most_pixels or MOST_TOKENS * self.unit**2) // self.unit**2))
        self.mean, self.std = tuple(mean or self.default_mean), tuple(std or self.default_std)
        self.resample = resample
        begin = self.control_token(config.vision_start_token_id, "vision start token")
        end = self.control_token(config.vision_end_token_id, "vision end token")
        self._view = f"{begin}{self.control_token(config.image_token_id, 'image token')}{end}"

    @classmethod
    def folder_options(cls, folder: Path, model: PreTrainedModel) -> dict:
        _, config = read_config(folder)
        size = config.get("size") or {}
        least = config.get("min_pixels") or size.get("shortest_edge")
        most = config.get("max_pixels") or size.get("longest_edge")
        areas = {"least_pixels": least, "most_pixels": most}
        return read_preprocessor(folder) | {name: area for name, area in areas.items() if area}

    @property
    def image_token_ids(self) -> tuple[int, ...]:
        return self._image_token_ids

    def layout(
        self, width: int, height: int, *, max_tiles: int, grid: tuple[int, int] | None = None, most: int | None = None
    ) -> Layout:
        if max_tiles > 1 or grid is not None:
            return super().layout(width, height, max_tiles=max_tiles, grid=grid)
        most = self.most if most is None else min(self.most, max(self.least, most))
        rows, cols = fit_tokens(width, height, self.unit, self.least, most)
        return Layout((1, 1), (rows * self.unit, cols * self.unit), (rows, cols))

    def image_text(self, layout: Layout) -> str:
        return self._view * layout.num_views

    def pixel_inputs(self, pictures: Sequence[tuple[Image.Image, Layout]]) -> dict[str, Tensor]:
        patches, grids = [], []
        for image, layout in pictures:
            for view in layout.cut(image, self.resample):
                patches.append(self._patches(to_array(view, self.mean, self.std)))
                grids.append([1, view.height // self.patch, view.width // self.patch])
        return {"pixel_values": torch.from_numpy(np.concatenate(patches)), "image_grid_thw": torch.tensor(grids)}

    def _patches(self, pixels: np.ndarray) -> np.ndarray:
        """Returns [3, h, w] as [patches, 3 * frames * patch * patch]; patches that are merged later stand together."""
        channels, height, width = pixels.shape
        merge, patch = self.merge, self.patch
        blocks = pixels.reshape(channels, height // self.unit, merge, patch, width // self.unit, merge, patch)
        blocks = blocks.transpose(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]
        still = np.repeat(blocks, self.frames, axis=5)  # a picture is a film that stands still
        return np.ascontiguousarray(still.reshape(height * width // patch**2, -1))


class Qwen3VL(Qwen25VL):
    """As Qwen2.5-VL, with patches of 16 px and pictures scaled to -1..1."""

    family = "qwen3_vl"
    default_mean, default_std = HALF, HALF
