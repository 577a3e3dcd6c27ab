"""Gemma-3 (transformers' own class): square pictures of 256 tokens each, bidirectional within themselves.

Gemma has no tiles: tiles and thumbnail are given as pictures of their own, each between <start_of_image> and
<end_of_image>. Its "pan and scan" is not used; it cuts along one side only and puts English words between the crops.
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
from .preprocessor import read_preprocessor
from .templates import GEMMA
from .tiling import Layout, to_array

HALF = (0.5, 0.5, 0.5)


class Gemma3(FrozenVLM):
    """Sees a picture as up to `max_tiles` square pictures (896 px) and a thumbnail, 256 tokens each."""

    family = "gemma3"
    end_of_turn = ("<end_of_turn>",)
    default_template = GEMMA

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        mean: tuple[float, ...] = HALF,
        std: tuple[float, ...] = HALF,
        resample: int = Image.Resampling.BILINEAR,
        **kwargs,
    ) -> None:
        config = model.config
        self._image_token_ids = (config.image_token_id,)
        super().__init__(model, tokenizer, **kwargs)
        self.tile_size = config.vision_config.image_size
        self.tile_side = math.isqrt(config.mm_tokens_per_image)
        self.mean, self.std, self.resample = tuple(mean), tuple(std), resample
        begin, end = config.boi_token_id, config.eoi_token_id
        context = self.control_token(self.image_token_ids[0], "image token")
        begin, end = self.control_token(begin, "begin-of-image token"), self.control_token(end, "end-of-image token")
        self._view = f"\n\n{begin}{context}{end}\n\n"

    @classmethod
    def folder_options(cls, folder: Path, model: PreTrainedModel) -> dict:
        return read_preprocessor(folder, model.config.vision_config.image_size)

    @property
    def image_token_ids(self) -> tuple[int, ...]:
        return self._image_token_ids

    def image_text(self, layout: Layout) -> str:
        return self._view * layout.num_views

    def pixel_inputs(self, pictures: Sequence[tuple[Image.Image, Layout]]) -> dict[str, Tensor]:
        views = [view for image, layout in pictures for view in layout.cut(image, self.resample)]
        return {"pixel_values": torch.from_numpy(np.stack([to_array(view, self.mean, self.std) for view in views]))}
