"""VERIFI: the VLM rewrites a request in context, and the states of what it writes are kept from that same pass.

Paper: Sec. 3, "VLM-Enabled Rewriting Injection with Flexible Inference".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .hidden_states import HiddenStates
from .vlm.base import FrozenVLM, Request


@dataclass(frozen=True, kw_only=True)
class RewriteSettings:
    """Everything that decided a rewrite, besides the pictures; JSON-able by `dataclasses.asdict`."""

    vlm: str
    dtype: str
    system: str
    prompt: str
    num_images: int
    max_tiles: int
    grid: tuple[int, int] | None
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Rewrite:
    """One rewrite; `ended` says what stopped it: the VLM itself, a stop string, or `max_new_tokens`."""

    text: str
    token_ids: tuple[int, ...]
    ended: Literal["end", "stop", "length"]
    settings: RewriteSettings


@dataclass(frozen=True, eq=False)
class Rewrites:
    """Rewrites of a batch and the hidden states of their whole sequences (system, images, instruction, rewrite)."""

    results: tuple[Rewrite, ...]
    hidden_states: HiddenStates

    @property
    def texts(self) -> list[str]:
        return [result.text for result in self.results]

    @property
    def token_ids(self) -> list[tuple[int, ...]]:
        return [result.token_ids for result in self.results]


def rewrite(
    vlm: FrozenVLM,
    requests: Sequence[Request],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | Sequence[int] = 0,
    stop: str | Sequence[str] | None = None,
    on_token: Callable[[int, int, str], None] | None = None,
) -> Rewrites:
    """Rewrites each request with the VLM and keeps the hidden states of that pass.

    A row of a batch is rewritten as it would be alone: each has its own random numbers.

    Args:
        max_new_tokens: most tokens of a rewrite, the closing token not counted.
        temperature: 0 is greedy. `top_p`: share of probability to sample from, 0 < top_p <= 1.
        seed: one for every row, or one per row.
        stop: strings that end a rewrite; it keeps the tokens before them.
        on_token: called with (row, token id, the row's text so far); may raise to cancel.
    Raises:
        ValueError: an empty prompt, a request that does not fit the VLM's context, settings out of range, or a VLM that
            wrote nothing.
    Paper: Sec. 3; one prefill and one forward per token, no second encoding.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    seeds = (seed,) * len(requests) if isinstance(seed, int) else tuple(seed)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens}: expected at least 1")
    if not temperature >= 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature {temperature}, top_p {top_p}: expected temperature >= 0 and 0 < top_p <= 1")
    if len(seeds) != len(requests):
        raise ValueError(f"{len(seeds)} seeds for {len(requests)} requests")
    if "" in stops:
        raise ValueError("a stop string is empty")
    for row, request in enumerate(requests):
        if not request.prompt.strip():
            raise ValueError(f"request {row}: the prompt is empty; say what the picture should show")

    # The last kept token has a state only once it has been read: room for one more token, which is dropped.
    prompts = vlm.prepare(requests, room=max_new_tokens + 1)
    writers = [_Writer(vlm, row, max_new_tokens, stops, on_token) for row in range(len(requests))]

    def after_step(tokens: list[int]) -> list[bool]:
        for writer, token in zip(writers, tokens, strict=True):
            writer.take(token)
        return [writer.ended is not None for writer in writers]

    choose = seeded_choice(seeds, temperature, top_p) if temperature > 0 else None
    taps = vlm.generate(prompts, max_new_tokens + 1, choose=choose, after_step=after_step)

    results = []
    for writer, request, row_seed in zip(writers, requests, seeds, strict=True):
        text = writer.text().strip()
        if not text:
            raise ValueError(f"request {writer.row}: the VLM wrote nothing for {request.prompt!r}; rephrase it")
        settings = RewriteSettings(
            vlm=vlm.identity,
            dtype=str(vlm.dtype).removeprefix("torch."),
            system=vlm.system_for(request),
            prompt=request.prompt,
            num_images=len(request.images),
            max_tiles=request.max_tiles,
            grid=request.grid,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=row_seed,
            stop=stops,
        )
        results.append(Rewrite(text=text, token_ids=tuple(writer.ids), ended=writer.ended, settings=settings))
    return Rewrites(tuple(results), vlm.collect(prompts, [result.token_ids for result in results], taps))


def replay(vlm: FrozenVLM, requests: Sequence[Request], token_ids: Sequence[Sequence[int]]) -> HiddenStates:
    """Returns the states of rewrites that are already known, by one forward instead of decoding.

    Equal to those `rewrite` kept, up to rounding, and laid out in the same way.

    Raises:
        ValueError: as `FrozenVLM.encode`, or an empty rewrite.
    """
    for row, ids in enumerate(token_ids):
        if not len(ids):
            raise ValueError(f"rewrite {row} is empty")
    return vlm.encode(requests, token_ids)


def seeded_choice(seeds: Sequence[int], temperature: float, top_p: float) -> Callable[[Tensor], Tensor]:
    """Returns a sampler of [B, vocabulary] logits that draws one number per row and step from the row's own generator.

    The draw falls on the cumulative probabilities in vocabulary order, which rounding cannot reorder.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def choose(logits: Tensor) -> Tensor:
        probs = (logits.double() / temperature).softmax(-1)
        if top_p < 1:
            ranked, order = probs.sort(dim=-1, descending=True, stable=True)
            outside = ranked.cumsum(-1) - ranked >= top_p
            probs = probs.masked_fill(outside.scatter(1, order, outside), 0)
        draws = torch.cat([torch.rand(1, dtype=torch.float64, generator=generator) for generator in generators])
        cumulative = probs.cumsum(-1)
        threshold = draws.to(probs.device)[:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp(max=probs.shape[1] - 1)

    return choose


class _Writer:
    """Follows one row: which tokens count, and when it is done."""

    def __init__(
        self,
        vlm: FrozenVLM,
        row: int,
        max_new_tokens: int,
        stops: tuple[str, ...],
        on_token: Callable[[int, int, str], None] | None,
    ) -> None:
        self.vlm, self.row, self.max_new_tokens = vlm, row, max_new_tokens
        self.stops, self.on_token = stops, on_token
        self.ids: list[int] = []
        self.ended: Literal["end", "stop", "length"] | None = None

    def take(self, token: int) -> None:
        if self.ended is not None:
            return
        if token in self.vlm.stop_ids:
            self.ended = "end"
        elif len(self.ids) == self.max_new_tokens:
            self.ended = "length"
        else:
            self.ids.append(token)
            self._look()

    def _look(self) -> None:
        """Reads the text so far, where anyone wants to know."""
        if not self.stops and self.on_token is None:
            return
        text = self.text()
        if hits := [text.index(string) for string in self.stops if string in text]:
            self.ended = "stop"
            while self.ids and len(self.text()) > min(hits):
                self.ids.pop()
        elif self.on_token is not None:
            self.on_token(self.row, self.ids[-1], text)

    def text(self) -> str:
        return self.vlm.tokenizer.decode(self.ids, skip_special_tokens=True)
