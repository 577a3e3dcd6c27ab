"""InternVL (transformers' own class): tiles of one size, a fixed number of tokens each, thumbnail last.

A picture is written <img>, one <IMG_CONTEXT> run per tile, </img>, before the instruction.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .base import FrozenVLM, View
from .tiling import as_rgb, choose_grid, split, to_array, token_positions

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class InternVL(FrozenVLM):
    """Sees a picture as up to `max_tiles` square tiles and a thumbnail, `tokens_per_tile` tokens each."""

    family = "internvl"
    end_of_turn = ("<|im_end|>",)

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
        self._context = tokenizer.convert_ids_to_tokens(self.image_token_ids[0])
        for token in ("<img>", self._context, "</img>"):
            if token is None or self.token_id(token) is None:
                raise ValueError(f"the tokenizer lacks {token or f'image token {self.image_token_ids[0]}'}")

    @property
    def image_token_ids(self) -> tuple[int, ...]:
        return self._image_token_ids

    def view(self, image: Image.Image, *, max_tiles: int, grid: tuple[int, int] | None) -> View:
        image = as_rgb(image)
        grid = grid or choose_grid(image.width, image.height, self.tile_size, max_tiles)
        tiles = split(image, grid, self.tile_size, self.resample)
        count = grid[0] * grid[1]
        parts = [("image", i, self.tokens_per_tile) for i in range(count)]
        if len(tiles) > count:
            parts.append(("thumbnail", None, self.tokens_per_tile))
        return View(
            pixels=torch.from_numpy(np.stack([to_array(tile, self.mean, self.std) for tile in tiles])),
            parts=tuple(parts),
            positions=torch.from_numpy(token_positions(grid, self.tile_side)),
        )

    def image_text(self, view: View) -> str:
        return f"<img>{self._context * len(view.parts)}</img>\n"


def read_preprocessor(folder: Path, tile_size: int) -> dict:
    """Returns mean, std and resampling from the folder's preprocessor file; {} where there is none.

    Raises:
        ValueError: the file asks for another tile size than the vision tower has.
    """
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            config = json.loads((folder / name).read_text(encoding="utf-8"))
            config = config.get("image_processor", config)
            break
    else:
        return {}
    size = config.get("size", {})
    if {size.get("height", tile_size), size.get("width", tile_size)} != {tile_size}:
        raise ValueError(f"{folder / name}: size {size}, but the vision tower takes {tile_size} px")
    names = {"image_mean": "mean", "image_std": "std", "resample": "resample"}
    return {ours: config[theirs] for theirs, ours in names.items() if config.get(theirs) is not None}
