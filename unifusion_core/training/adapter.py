"""Training a LAP adapter (`conditioning.adapter`) before its frozen host: who asks the VLM, and what is learned.

B batch, T tokens, E VLM width, S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

import torch
from PIL import Image
from torch import Tensor, nn

from ..conditioning.adapter import AdapterSpec, LAPAdapter, host_states
from ..conditioning.profiles import flatten
from ..conditioning.vlm import FrozenVLM, Request
from ..diffusion import flow
from .asked import Asked, Kind, Teacher
from .feed import MicroBatch
from .samples import Damaged, Texts

MOST_TOKENS = 480  # of a caption
Host = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
"""host(latents [B, C, h, w], t [B], tokens [B, T, S E], mask [B, T] or None) → velocity [B, C, h, w] (`hosts.py`)."""


class HostTeacher(Teacher):
    """Asks the VLM as the host's own pipeline does: the whole chat text of a caption, no rewrite.

    A longer caption is cut: Z-Image's and Klein's pipelines take 512 tokens with the chat text around it.
    Never asked for edits, which `adapting` refuses.
    Departs: VERIFI's tokens are left to inference; the host has never seen a conversation go on.
    """

    def __init__(
        self, vlm: FrozenVLM, spec: AdapterSpec, tiles: Sequence[int] = (1,), most_tokens: int = MOST_TOKENS
    ) -> None:
        super().__init__(vlm, tiles, most_tokens)
        self.profile = spec.host

    def ask(self, kind: Kind, texts: Texts, picture: Image.Image | None, rng: Random) -> Asked:
        if kind in ("picture", "joint") and self.profile.images == "none":
            raise Damaged(f"{self.profile.encoder} sees no pictures; train on text alone (--mix 1,0,0)")
        prompt = "" if kind in ("empty", "picture") else texts.caption
        images = () if kind in ("text", "empty") else (picture,)
        with self._lock:
            prompt = self._cut(prompt)
            template = self.profile.template_for(prompt, len(images))
            request = Request(prompt, images, template=template, image_label=self.profile.image_label)
            request = replace(request, max_tiles=rng.choice(self.tiles))
            try:
                self.vlm.count_tokens(request)
            except ValueError as error:
                raise Damaged(f"the VLM does not take it: {error}") from None
        return Asked(kind, request)

    def _cut(self, text: str) -> str:
        ends = self.vlm.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
        return text if len(ends) <= self.most_tokens else text[: ends[self.most_tokens - 1][1]]

    def states(self, rows: Sequence[Asked]) -> tuple[Tensor, Tensor, Tensor]:
        with self._lock:
            hidden = self.vlm.encode([row.request for row in rows]).select(*self.profile.kinds)
        norm = self.vlm.final_norm if self.profile.post_norm else None
        with torch.no_grad():
            return host_states(hidden, self.profile, norm), hidden.mask, hidden.positions


class AdapterTrainee(nn.Module):
    """The adapter before its frozen host, which is no parameter of it."""

    def __init__(self, adapter: LAPAdapter, host: Host, compute: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.adapter, self.compute = adapter, compute
        self._host = [host]

    @property
    def units(self) -> list[nn.Module]:
        return list(self.adapter.laps)

    def forward(self, batch: MicroBatch) -> Tensor:
        """Mean squared error of the host's velocity of each row [B], float32."""
        velocity = self._velocity(batch, self._tokens(batch))
        error = velocity.float() - flow.velocity_target(batch.latents, batch.noise)
        return error.square().flatten(1).mean(1)

    @torch.no_grad()
    def departure(self, batch: MicroBatch) -> float:
        """How far the host's velocity is, at most, from what it is without the adapter: 0 before any training."""
        profile = self.adapter.spec.host
        own = [self.adapter.spec.layers.index(layer) for layer in profile.layers]
        alone = flatten(batch.states[:, :, own], profile)
        velocities = [self._velocity(batch, tokens) for tokens in (self._tokens(batch), alone)]
        return (velocities[0] - velocities[1]).abs().max().item()

    def _tokens(self, batch: MicroBatch) -> Tensor:
        with torch.autocast(batch.states.device.type, self.compute, enabled=self.compute != torch.float32):
            return self.adapter(batch.states if self.compute != torch.float32 else batch.states.float())

    def _velocity(self, batch: MicroBatch, tokens: Tensor) -> Tensor:
        return self._host[0](flow.x_t(batch.latents, batch.noise, batch.t), batch.t, tokens, batch.mask)
