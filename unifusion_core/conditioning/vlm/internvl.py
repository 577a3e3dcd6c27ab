"""InternVL (transformers' own class): tiles of one size, a fixed number of tokens each, thumbnail last.

A picture is written <img>, one <IMG_CONTEXT> run per tile, </img>, before the instruction.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .base import FrozenVLM
from .preprocessor import read_preprocessor
from .templates import CHATML
from .tiling import Layout, to_array

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class InternVL(FrozenVLM):
    """Sees a picture as up to `max_tiles` square tiles and a thumbnail, `tokens_per_tile` tokens each."""

    family = "internvl"
    end_of_turn = ("<|im_end|>",)
    default_template = CHATML

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        resample: int = Image.Resampling.BICUBIC,
        **kwargs,
    ) -> None:
        self._image_token_ids = (model.config.image_token_id,)
        super().__init__(model, tokenizer, **kwargs)
        vision = model.config.vision_config
        if vision.image_size[0] != vision.image_size[1]:
            raise ValueError(f"vision image_size {tuple(vision.image_size)}: tiles must be square")
        self.tile_size = vision.image_size[0]
        self.tile_side = int(vision.image_size[0] // vision.patch_size[0] * model.config.downsample_ratio)
        self.tokens_per_tile = self.tile_side**2
        self.mean, self.std, self.resample = tuple(mean), tuple(std), resample
        self._context = self.control_token(self.image_token_ids[0], "image token")
        for token in ("<img>", "</img>"):
            if self.token_id(token) is None:
                raise ValueError(f"the tokenizer lacks {token}")

    @classmethod
    def folder_options(cls, folder: Path, model: PreTrainedModel) -> dict:
        return read_preprocessor(folder, model.config.vision_config.image_size[0])

    @property
    def image_token_ids(self) -> tuple[int, ...]:
        return self._image_token_ids

    def image_text(self, layout: Layout) -> str:
        return f"<img>{self._context * layout.num_views}</img>\n"

    def pixel_inputs(self, pictures: Sequence[tuple[Image.Image, Layout]]) -> dict[str, Tensor]:
        views = [view for image, layout in pictures for view in layout.cut(image, self.resample)]
        return {"pixel_values": torch.from_numpy(np.stack([to_array(view, self.mean, self.std) for view in views]))}
