"""Any other transformers VLM or language model that meets the contract below.

What is needed for text:
- `model.get_decoder().layers`: an `nn.ModuleList` of all `num_hidden_layers` decoder layers, each of which takes the
  residual stream [B, T, E] as its first argument and returns it (alone or first in a tuple);
- `model.get_input_embeddings()`, `model.generate` and an output head;
- a fast tokenizer with a chat template (`chat_template.jinja`), and an end-of-text token.

What is needed for images, besides:
- the folder's own processor (AutoProcessor) loads, and can be called with text and images. It must have an
  `image_processor`, and an `image_token` or `boi_token`: the one token that stands for a picture in the text;
- `config.image_token_id` (or `image_token_index`): the token whose embedding a picture's features replace.
How many tokens a picture takes, and which markers go between them, is read off the processor's own ids for a blank
picture. Tiles and thumbnail are given as pictures of their own. Without all this the model takes text only, and says
why when it is given an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoProcessor, PreTrainedModel, PreTrainedTokenizerBase

from .base import FrozenVLM
from .request import Prompts
from .tiling import Layout, as_rgb

TILE = 448  # px, where the processor takes pictures of any size

# what a processor raises that lacks a part: a library, a file, a field of its config
_LACKING = (ImportError, OSError, ValueError, TypeError, KeyError, AttributeError)


@dataclass(frozen=True)
class GeneralLayout(Layout):
    """A layout with the ids of one view as the processor writes them, markers and all."""

    ids: tuple[int, ...] = ()


class GeneralVLM(FrozenVLM):
    """Drives a model of an unknown family by the parts that transformers models have in common."""

    family = "general"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        processor: Any = None,
        no_images: str = "its folder has no processor",
        **kwargs,
    ) -> None:
        """Takes the model and its tokenizer.

        Args:
            processor: the folder's own; None = text only, for the reason `no_images`.
        Raises:
            ValueError: the model does not meet the contract; names what is missing.
        """
        self.family = model.config.model_type
        check_contract(model, tokenizer)
        self.processor, self.no_images = processor, no_images
        self._image_token_ids: tuple[int, ...] = ()
        self._token: str | None = None
        self._known: dict[tuple[int, int], GeneralLayout] = {}
        self._types: set[str] = set()  # token types that the processor writes
        if processor is not None:
            self._read_processor(model, tokenizer)
        super().__init__(model, tokenizer, **kwargs)
        if self.processor is not None:
            self._fixed = _fixed_size(processor.image_processor)
            self.tile_size = self._fixed or TILE

    @classmethod
    def folder_options(cls, folder: Path, model: PreTrainedModel) -> dict:
        if not hasattr(model.config, "vision_config"):
            return {"no_images": "its config has no vision_config"}
        try:
            return {"processor": AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)}
        except _LACKING as error:
            return {"no_images": f"its processor does not load ({' '.join(str(error).split())[:200]})"}

    def _read_processor(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Finds the picture tokens; without them the model is text only."""
        context = getattr(model.config, "image_token_id", None) or getattr(model.config, "image_token_index", None)
        names = [getattr(self.processor, name, None) for name in ("image_token", "boi_token")]
        token = next((name for name in names if isinstance(name, str) and name in tokenizer.get_vocab()), None)
        lacking = None
        if not isinstance(context, int):
            lacking = "its config names no image_token_id"
        elif token is None:
            lacking = f"its {type(self.processor).__name__} names no image_token of the tokenizer"
        elif getattr(self.processor, "image_processor", None) is None:
            lacking = f"its {type(self.processor).__name__} has no image_processor"
        if lacking is not None:
            self.processor, self.no_images = None, lacking
            return
        self._token, self._image_token_ids = token, (context,)

    @property
    def image_token_ids(self) -> tuple[int, ...]:
        return self._image_token_ids

    @property
    def placeholder_id(self) -> int | None:
        return None if self._token is None else self.token_id(self._token)

    def layout(
        self, width: int, height: int, *, max_tiles: int, grid: tuple[int, int] | None = None, most: int | None = None
    ) -> Layout:
        if self.processor is None:
            raise ValueError(f"this {self.family} model takes no images here: {self.no_images}; leave the images out")
        if max_tiles == 1 and grid is None and not self._fixed:
            return self._view((1, 1), height, width)
        tiled = super().layout(width, height, max_tiles=max_tiles, grid=grid)
        return self._view(tiled.grid, *tiled.size)

    def _view(self, grid: tuple[int, int], height: int, width: int) -> GeneralLayout:
        """Asks the processor how it writes one picture of this size."""
        if (height, width) not in self._known:
            blank = Image.new("RGB", (width, height))
            try:
                written = self.processor(text=[self._token], images=[blank], return_tensors="pt")
            except _LACKING as error:
                raise ValueError(
                    f"this {self.family} model takes no images here: its processor fails on a picture of "
                    f"{width}x{height} px ({' '.join(str(error).split())[:200]})"
                ) from error
            self._types |= set(written.keys())
            ids = written["input_ids"][0].tolist()
            own = [i for i, token in enumerate(ids) if token in self.image_token_ids]
            if not own:
                raise ValueError(
                    f"this {self.family} model takes no images here: its processor writes no image token "
                    f"(id {self.image_token_ids[0]}) for a picture"
                )
            plain = set(self.tokenizer("", add_special_tokens=True)["input_ids"])  # begin- and end-of-text
            start, stop = own[0], own[-1] + 1
            while start > 0 and ids[start - 1] not in plain:
                start -= 1
            while stop < len(ids) and ids[stop] not in plain:
                stop += 1
            side = _rectangle(len(own), width / height)
            self._known[height, width] = GeneralLayout((1, 1), (height, width), side, tuple(ids[start:stop]))
        known = self._known[height, width]
        return GeneralLayout(grid, known.size, known.side, known.ids)

    def image_text(self, layout: Layout) -> str:
        return self._token * layout.num_views

    def view_ids(self, layout: GeneralLayout) -> list[int]:
        return list(layout.ids)

    def pixel_inputs(self, pictures: Sequence[tuple[Image.Image, Layout]]) -> dict[str, Tensor]:
        views = [view for image, layout in pictures for view in layout.cut(as_rgb(image), self.resample)]
        found = self.processor.image_processor(images=views, return_tensors="pt")
        tensors = {name: value for name, value in found.items() if name in self.accepted and torch.is_tensor(value)}
        return {n: value.to(self.dtype) if value.is_floating_point() else value for n, value in tensors.items()}

    def model_inputs(self, prompts: Prompts, mask: Tensor) -> dict[str, Tensor]:
        inputs = super().model_inputs(prompts, mask)
        return {n: value for n, value in inputs.items() if not n.endswith("token_type_ids") or n in self._types}


def check_contract(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError, naming all that is missing, unless text can be encoded and written by this model."""
    lacking = []
    text = model.config.get_text_config()
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    layers = getattr(decoder, "layers", None)
    count = getattr(text, "num_hidden_layers", None)
    if model.config.is_encoder_decoder:
        lacking.append("a decoder-only model (this one has an encoder for text)")
    if not isinstance(layers, nn.ModuleList):
        lacking.append("get_decoder().layers (a list of decoder layers)")
    elif len(layers) != count:
        lacking.append(f"get_decoder().layers of num_hidden_layers = {count} layers (there are {len(layers)})")
    if not isinstance(getattr(text, "hidden_size", None), int):
        lacking.append("hidden_size in its text config")
    if not hasattr(model, "generate") or model.get_output_embeddings() is None:
        lacking.append("generate() and an output head")
    if not tokenizer.is_fast:
        lacking.append("a fast tokenizer (tokenizer.json)")
    if not tokenizer.chat_template:
        lacking.append("a chat template (chat_template.jinja)")
    if lacking:
        raise ValueError(f"model_type {model.config.model_type!r} cannot be used; it lacks {'; '.join(lacking)}")


def _fixed_size(image_processor: Any) -> int | None:
    """Returns the side of the square that every picture is made into, None if pictures keep their size."""
    for name in ("crop_size", "size"):
        if getattr(image_processor, f"do_{'center_crop' if name == 'crop_size' else 'resize'}", None) is not True:
            continue
        size = getattr(image_processor, name, None)
        height, width = (getattr(size, side, None) for side in ("height", "width"))
        if isinstance(size, dict):
            height, width = size.get("height"), size.get("width")
        if height and height == width:
            return int(height)
    return None


def _rectangle(count: int, aspect: float) -> tuple[int, int]:
    """Returns the (rows, cols) of `count` tokens that come closest to a picture's aspect ratio."""
    shapes = [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]
    return min(shapes, key=lambda shape: abs(shape[1] / shape[0] - aspect))
