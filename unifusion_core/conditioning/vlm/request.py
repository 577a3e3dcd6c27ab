"""What a VLM is asked, and the same as token ids with a name for every span.

B batch, P prompt tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image
from torch import Tensor

from ..hidden_states import Span
from .tiling import check_grid

SLOTS = {"system": "{system}", "images": "{images}", "prompt": "{prompt}"}  # of `Request.template`


@dataclass(frozen=True)
class Request:
    """Asks for one picture.

    Args:
        prompt: the user's words.
        images: reference pictures, placed before the prompt in this order.
        system: system prompt; None = the VLM folder's own or the default of `verifi_prompts`, "" = no system turn.
        max_tiles: largest number of tiles per picture, the thumbnail not counted (the paper's 10 = 9 + thumbnail).
        grid: (rows, cols) of tiles to force instead of the closest aspect ratio.
        template: chat text to use as it is instead of the tokenizer's chat template, with the slots {prompt} (once),
            {images} and {system} (at most once). The prompt is then not stripped.
        image_label: goes before each picture, {n} counting from 1, such as "Picture {n}: ".
        token_budget: most picture tokens of the whole request; fewer tiles or a lower resolution keep to it.
    """

    prompt: str
    images: tuple[Image.Image, ...] = ()
    system: str | None = None
    max_tiles: int = 9
    grid: tuple[int, int] | None = None
    template: str | None = None
    image_label: str = ""
    token_budget: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", tuple(self.images))
        if self.max_tiles < 1:
            raise ValueError(f"max_tiles {self.max_tiles}: expected at least 1")
        if self.token_budget is not None and self.token_budget < 1:
            raise ValueError(f"token_budget {self.token_budget}: expected at least 1, or None for no limit")
        if self.template is not None:
            check_template(self.template, self.images, self.system)
        if self.grid is not None:
            object.__setattr__(self, "grid", check_grid(self.grid))


def check_template(template: str, images: Sequence = (), system: str | None = None) -> None:
    """Raises ValueError for slots that are missing, stand there twice, or have no place for what the request brings."""
    counts = {slot: template.count(mark) for slot, mark in SLOTS.items()}
    if counts["prompt"] != 1 or max(counts.values()) > 1:
        raise ValueError(f"template {template!r}: expected {{prompt}} once, and {{images}} and {{system}} at most once")
    if images and not counts["images"]:
        raise ValueError(f"template {template!r}: no {{images}} slot for the request's {len(images)} images")
    if system and not counts["system"]:
        raise ValueError(f"template {template!r}: no {{system}} slot for the request's system prompt; leave that out")


@dataclass(frozen=True, eq=False)
class Prompts:
    """A left-padded batch, ready for the model."""

    ids: Tensor  # [B, P]
    mask: Tensor  # [B, P] bool
    positions: Tensor  # [B, P, 3]
    spans: tuple[tuple[Span, ...], ...]
    inputs: dict[str, Tensor] = field(default_factory=dict)  # pixels; empty without pictures

    @property
    def image_mask(self) -> Tensor:
        """[B, P] bool, True where a picture's token stands."""
        return self.positions[..., 0] > 0
