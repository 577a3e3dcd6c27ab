"""VERIFI: the VLM rewrites a request in context, and the states of what it writes are kept from that same pass.

Paper: Sec. 3, "VLM-Enabled Rewriting Injection with Flexible Inference".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from .hidden_states import HiddenStates
from .quotes import quoted
from .vlm.base import FrozenVLM
from .vlm.request import Request
from .vlm.tiling import as_rgb
from .writer import Think, Writer, think_room

RECORD = "unifusion_rewrite"  # the key that marks a record, and its version
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class RewriteSettings:
    """Everything that decided a rewrite; of the pictures, their SHA-256. JSON-able by `dataclasses.asdict`."""

    vlm: str
    dtype: str
    system: str
    prompt: str
    num_images: int
    images: tuple[str, ...] = ()
    max_tiles: int
    grid: tuple[int, int] | None
    template: str | None = None
    image_label: str = ""
    token_budget: int | None = None
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...]
    think: Think = "keep"
    protect_quotes: bool = False


@dataclass(frozen=True, kw_only=True)
class Rewrite:
    """One rewrite; `ended` says what stopped it: the VLM itself, a stop string, or `max_new_tokens`.

    `token_ids` are the rewrite's; `think_ids` those of the thinking before it, its closing tag included.
    """

    text: str
    token_ids: tuple[int, ...]
    ended: Literal["end", "stop", "length"]
    settings: RewriteSettings
    think: str = ""
    think_ids: tuple[int, ...] = ()

    def to_json(self) -> str:
        """Returns the record of this rewrite, from which `replay` has the same states."""
        return json.dumps({RECORD: VERSION, **asdict(self)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Rewrite:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: no record, one of another version, or one with wrong or missing entries.
        """
        record = _record(text)
        if record is None:
            raise ValueError(f"no record of a rewrite: expected JSON with the entry {RECORD!r}")
        if record.pop(RECORD) != VERSION:
            raise ValueError(f"the record of a rewrite has another version than {VERSION}; write it again")
        settings = record.get("settings")
        if not isinstance(settings, dict):
            raise ValueError("the record of a rewrite has no settings")
        return _read(cls, {**record, "settings": _read(RewriteSettings, settings)})


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
    think: Think = "keep",
    protect_quotes: bool = False,
    cache: bool = True,
    on_token: Callable[[int, int, str], None] | None = None,
) -> Rewrites:
    """Rewrites each request with the VLM and keeps the hidden states of that pass.

    A row of a batch is rewritten as it would be alone: each has its own random numbers. One request with pictures reads
    them only if `vlm.prefix_cache` does not hold them already.

    Args:
        max_new_tokens: most tokens of a rewrite, the closing token not counted. Thinking that has no limit of its own
            counts too.
        temperature: 0 is greedy. `top_p`: share of probability to sample from, 0 < top_p <= 1.
        seed: one for every row, or one per row.
        stop: strings that end a rewrite; it keeps the tokens before them. Not looked for in the thinking.
        think: what becomes of a thinking model's `<think>...</think>`: its states are kept as a span of their own, or
            dropped (the rewrite has still seen it); a number n also limits it to n tokens, after which the closing tag
            is forced. Without meaning for other models.
        protect_quotes: what the prompt has in quotation marks must stand in the rewrite letter by letter, see
            `quotes.QuoteGuard`.
        cache: False reads the pictures anew and remembers nothing of them.
        on_token: called with (row, token id, the row's text so far, of the thinking while it lasts); may raise to
            cancel.
    Raises:
        ValueError: an empty prompt, a request that does not fit the VLM's context, settings out of range, or a VLM that
            wrote nothing, did not finish thinking, or left out a protected string.
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
    check_think(think)
    for row, request in enumerate(requests):
        if not request.prompt.strip():
            raise ValueError(f"request {row}: the prompt is empty; say what the picture should show")

    # The last kept token has a state only once it has been read: room for one more token, which is dropped.
    room = max_new_tokens + think_room(vlm, think) + 1
    prompts = vlm.prepare(requests, room=room)
    writers = [
        Writer(
            vlm,
            prompts,
            row,
            max_new_tokens=max_new_tokens,
            think=think,
            stops=stops,
            strings=quoted(request.prompt) if protect_quotes else (),
            on_token=on_token,
        )
        for row, request in enumerate(requests)
    ]
    free = seeded_choice(seeds, temperature, top_p) if temperature > 0 else None
    demanding = isinstance(think, int) or protect_quotes

    def choose(logits: Tensor) -> Tensor:
        proposed = logits.argmax(-1) if free is None else free(logits)
        tokens = [writer.choose(token) for writer, token in zip(writers, proposed.tolist(), strict=True)]
        return torch.tensor(tokens, device=logits.device)

    def after_step(tokens: list[int]) -> list[bool]:
        for writer, token in zip(writers, tokens, strict=True):
            writer.take(token)
        return [writer.ended is not None for writer in writers]

    taps = vlm.generate(prompts, room, choose=choose if demanding else free, after_step=after_step, reuse=cache)

    results = []
    for writer, request, row_seed in zip(writers, requests, seeds, strict=True):
        writer.check(request.prompt)
        settings = RewriteSettings(
            **_request_settings(vlm, request),
            dtype=str(vlm.dtype).removeprefix("torch."),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=row_seed,
            stop=stops,
            think=think,
            protect_quotes=protect_quotes,
        )
        results.append(
            Rewrite(
                text=writer.text().strip(),
                token_ids=tuple(writer.rewrite_ids),
                ended=writer.ended,
                settings=settings,
                think=writer.think_text(),
                think_ids=tuple(writer.ids[: writer.num_think]),
            )
        )
    hidden = vlm.collect(prompts, [writer.ids for writer in writers], taps)
    return Rewrites(tuple(results), _thinking(hidden, results, think))


def replay(
    vlm: FrozenVLM, requests: Sequence[Request], rewrites: Sequence[Rewrite] | Sequence[Sequence[int]]
) -> HiddenStates:
    """Returns the states of rewrites that are already known, by one forward instead of decoding.

    Equal to those `rewrite` kept, up to rounding, and laid out in the same way.

    Args:
        rewrites: records of rewrites, which must be of this VLM and these requests; or token ids.
    Raises:
        ValueError: as `FrozenVLM.encode`; an empty rewrite; or a record of another VLM, prompt or picture.
    """
    records = [record for record in rewrites if isinstance(record, Rewrite)]
    if not records:
        for row, ids in enumerate(rewrites):
            if not len(ids):
                raise ValueError(f"rewrite {row} is empty")
        return vlm.encode(requests, rewrites, reuse=True)
    if len(records) != len(rewrites) or len(records) != len(requests):
        raise ValueError(f"{len(records)} records of rewrites for {len(requests)} requests; give one for each")
    modes = {record.settings.think == "drop" for record in records}
    if len(modes) > 1:
        raise ValueError("some records keep the states of the thinking and some drop them; replay them apart")
    for row, (record, request) in enumerate(zip(records, requests, strict=True)):
        if others := differences(vlm, request, record):
            raise ValueError(f"record {row} is of another request: {'; '.join(others)}")
        if not record.token_ids:
            raise ValueError(f"rewrite {row} is empty")
    hidden = vlm.encode(requests, [(*record.think_ids, *record.token_ids) for record in records], reuse=True)
    return _thinking(hidden, records, records[0].settings.think)


def differences(vlm: FrozenVLM, request: Request, record: Rewrite) -> list[str]:
    """Says in what this VLM, prompt and pictures are not those of a record; empty where all are the same."""
    now, then = _request_settings(vlm, request), asdict(record.settings)
    found = [f"{name} is {_short(now[name])}, not {_short(then[name])}" for name in now if now[name] != then[name]]
    if not found and vlm.tokenizer.decode(list(record.token_ids), skip_special_tokens=True).strip() != record.text:
        found.append("its text is not what its token ids say; to use an edited text, give the text alone")
    return found


def check_think(think: Think) -> None:
    """Raises ValueError for anything but "keep", "drop" or a number of tokens."""
    if think not in ("keep", "drop") and (not isinstance(think, int) or isinstance(think, bool) or think < 0):
        raise ValueError(f'think {think!r}: expected "keep", "drop" or a number of tokens from 0')


def is_record(text: str) -> bool:
    """Says whether a text is the record of a rewrite, and no rewrite itself."""
    return _record(text) is not None


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


def _thinking(hidden: HiddenStates, rewrites: Sequence[Rewrite], think: Think) -> HiddenStates:
    hidden = hidden.with_thinking([len(rewrite.think_ids) for rewrite in rewrites])
    return hidden.without("think") if think == "drop" else hidden


def _request_settings(vlm: FrozenVLM, request: Request) -> dict:
    """What a record holds of VLM and request."""
    return dict(
        vlm=vlm.identity,
        system=vlm.system_for(request),
        prompt=request.prompt,
        num_images=len(request.images),
        images=tuple(map(_digest, request.images)),
        max_tiles=request.max_tiles,
        grid=request.grid,
        template=request.template,
        image_label=request.image_label,
        token_budget=request.token_budget,
    )


def _digest(image: Image.Image) -> str:
    image = as_rgb(image)
    return sha256(f"{image.width}x{image.height} ".encode() + image.tobytes()).hexdigest()


def _record(text: str) -> dict | None:
    if not text.lstrip().startswith("{"):
        return None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):  # a text that begins with a brace
        return None
    return record if isinstance(record, dict) and RECORD in record else None


# What stands in a record, by the type its field has.
_KINDS = {
    "str": lambda value: isinstance(value, str),
    "int": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "float": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    "bool": lambda value: isinstance(value, bool),
    "str | None": lambda value: value is None or isinstance(value, str),
    "int | None": lambda value: value is None or isinstance(value, int),
    "tuple[str, ...]": lambda value: isinstance(value, list) and all(isinstance(x, str) for x in value),
    "tuple[int, ...]": lambda value: isinstance(value, list) and all(type(x) is int and 0 <= x < 2**31 for x in value),
    "tuple[int, int] | None": lambda value: (
        value is None or (isinstance(value, list) and len(value) == 2 and all(type(x) is int for x in value))
    ),
    "Literal['end', 'stop', 'length']": lambda value: value in ("end", "stop", "length"),
}


def _read(cls: type, record: dict):
    """Makes a dataclass from JSON, each entry of which must have its field's type."""
    names = {field.name: field.type.replace('"', "'") for field in fields(cls)}
    if record.keys() != names.keys():
        odd = ", ".join(sorted(record.keys() ^ names.keys()))
        raise ValueError(f"the record of a rewrite lacks entries, or has unknown ones: {odd}")
    for name, value in record.items():
        if name == "think" and cls is RewriteSettings:
            check_think(value)
        elif not isinstance(value, RewriteSettings) and not _KINDS[names[name]](value):
            raise ValueError(f"the record of a rewrite has {name} {_short(value)}, which is no {names[name]}")
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in record.items()})


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
