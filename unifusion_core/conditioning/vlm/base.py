"""A frozen VLM: requests (prompt, pictures) -> token ids with named spans -> hidden states of the tapped layers.

B batch, P prompt tokens, T tokens, L tapped layers, E VLM width. A family (`internvl.py`, ...) says how a picture is
written into the prompt and how its pixels reach the model; everything else is here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from ..hidden_states import HiddenStates, Span, SpanKind
from ..verifi_prompts import default_system_prompt
from .tiling import check_grid

_SYSTEM, _USER = "unifusionsystemslot", "unifusionuserslot"


@dataclass(frozen=True)
class Request:
    """Asks for one picture.

    Args:
        prompt: the user's words.
        images: reference pictures, placed before the prompt in this order.
        system: system prompt; None = the VLM folder's own or the default of `verifi_prompts`, "" = no system turn.
        max_tiles: largest number of tiles per picture, the thumbnail not counted (the paper's 10 = 9 + thumbnail).
        grid: (rows, cols) of tiles to force instead of the closest aspect ratio.
    """

    prompt: str
    images: tuple[Image.Image, ...] = ()
    system: str | None = None
    max_tiles: int = 9
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", tuple(self.images))
        if self.max_tiles < 1:
            raise ValueError(f"max_tiles {self.max_tiles}: expected at least 1")
        if self.grid is not None:
            object.__setattr__(self, "grid", check_grid(self.grid))


@dataclass(frozen=True, eq=False)
class View:
    """One picture as a family sees it: `parts` (kind, tile number, number of tokens) in the order of `pixels`."""

    pixels: Tensor  # [parts, ...]
    parts: tuple[tuple[SpanKind, int | None, int], ...]
    positions: Tensor  # [tokens, 3]


@dataclass(frozen=True, eq=False)
class Prompts:
    """A left-padded batch, ready for the model."""

    ids: Tensor  # [B, P]
    mask: Tensor  # [B, P] bool
    positions: Tensor  # [B, P, 3]
    spans: tuple[tuple[Span, ...], ...]
    inputs: dict[str, Tensor] = field(default_factory=dict)  # pixels; empty without pictures


def every_third(num_layers: int, residue: int = 2) -> tuple[int, ...]:
    """Returns the paper's default taps: residue, residue + 3, ... up to `num_layers`.

    The paper says every third layer, not which; residue 2 is Krea 2's choice (2, 5, ..., 35 of 36).
    """
    return tuple(range(residue, num_layers + 1, 3))


class FrozenVLM:
    """Wraps a loaded transformers model; never trained, so not an `nn.Module` of its own.

    `identity` names the VLM (family, layers, width, signs of its embeddings), so that a fusion head is not fed by
    another one. It survives a change of dtype; a fine-tune that leaves the embeddings alone shares it.
    """

    family: ClassVar[str]
    end_of_turn: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        layers: Sequence[int] | None = None,
        system_prompt: str | None = None,
    ) -> None:
        text = model.config.get_text_config()
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.decoder_layers: nn.ModuleList = model.get_decoder().layers
        self.num_layers: int = text.num_hidden_layers
        self.width: int = text.hidden_size
        self.context_length: int | None = getattr(text, "max_position_embeddings", None)
        self.system_prompt = system_prompt
        assert len(self.decoder_layers) == self.num_layers
        self.layers = every_third(self.num_layers) if layers is None else tuple(int(i) for i in layers)
        rising = self.layers and list(self.layers) == sorted(set(self.layers))
        if not rising or self.layers[0] < 0 or self.layers[-1] > self.num_layers:
            raise ValueError(f"layers {self.layers}: expected rising indices from 0 to {self.num_layers}")
        if not tokenizer.is_fast:
            raise ValueError(f"tokenizer {type(tokenizer).__name__}: a fast tokenizer is needed to locate the spans")
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat_template; the VLM folder needs chat_template.jinja")

        folder_stop = model.generation_config.eos_token_id
        stops = {tokenizer.eos_token_id, *(folder_stop if isinstance(folder_stop, list) else [folder_stop])}
        stops |= {self.token_id(token) for token in self.end_of_turn}
        self.stop_ids = tuple(sorted(stops - {None}))
        if not self.stop_ids:
            raise ValueError("neither the tokenizer nor generation_config.json names an end-of-text token")
        self.pad_id: int = self.stop_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        # penalties, sampling or length limits of the folder must not decide what VERIFI writes
        model.generation_config = GenerationConfig(eos_token_id=list(self.stop_ids), pad_token_id=self.pad_id)

        added = tokenizer.added_tokens_decoder.values()
        self._control_tokens = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
        self._control_tokens |= {tokenizer.convert_ids_to_tokens(i) for i in self.image_token_ids}
        rows = model.get_input_embeddings().weight
        signs = torch.signbit(rows[:: max(1, len(rows) // 64)].float()).cpu().numpy().tobytes()
        digest = hashlib.sha256(signs).hexdigest()[:12]
        self.identity = f"{model.config.model_type}-{self.num_layers}x{self.width}-{digest}"

    # What a family fills in.

    @property
    def image_token_ids(self) -> tuple[int, ...]:
        """Ids that stand for picture tokens; the first is the placeholder. Empty for a text-only family."""
        return ()

    def view(self, image: Image.Image, *, max_tiles: int, grid: tuple[int, int] | None) -> View:
        """Cuts a picture into what the vision tower takes."""
        raise ValueError(f"{self.family} is a text-only model and takes no images")

    def image_text(self, view: View) -> str:
        """Writes a picture into the prompt, with one placeholder token for each of the view's parts."""
        raise ValueError(f"{self.family} is a text-only model and takes no images")

    def pixel_inputs(self, views: list[View]) -> dict[str, Tensor]:
        """Names the pixel tensors for `model.forward`; the views of all rows in order."""
        return {"pixel_values": torch.cat([view.pixels for view in views]).to(self.device)}

    # From requests to ids.

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def to(self, device: torch.device | str) -> FrozenVLM:
        """Moves the model; returns itself."""
        self.model.to(device)
        return self

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token, None if the vocabulary lacks it."""
        return self.tokenizer.get_vocab().get(token)

    def system_for(self, request: Request) -> str:
        """Returns the system prompt this request will be given."""
        if request.system is not None:
            return request.system.strip()
        return (self.system_prompt or default_system_prompt(len(request.images))).strip()

    def prepare(self, requests: Sequence[Request], *, room: int = 0, allow_empty: bool = False) -> Prompts:
        """Writes requests as a left-padded batch that ends with the assistant's header.

        Args:
            room: tokens that will follow; checked against the VLM's context.
            allow_empty: take a request with neither words nor pictures.
        Raises:
            ValueError: no request, one with neither words nor pictures, control tokens typed into a text, or too long.
        """
        if not requests:
            raise ValueError("no request given")
        rows, views = [], []
        for request in requests:
            if not (request.prompt.strip() or request.images or allow_empty):
                raise ValueError("the prompt is empty and there is no image")
            row_views = [self.view(image, max_tiles=request.max_tiles, grid=request.grid) for image in request.images]
            rows.append(self._row(request, row_views))
            views += row_views
        length = max(len(ids) for ids, _, _ in rows)
        if self.context_length is not None and length + room > self.context_length:
            longest = max(range(len(rows)), key=lambda i: len(rows[i][0]))
            raise ValueError(
                f"request {longest} is {length} tokens long and {room} more are to follow: {length + room} exceeds the "
                f"VLM's context of {self.context_length}; shorten the prompt, or use fewer tiles or images"
            )
        ids = torch.full((len(rows), length), self.pad_id)
        positions = torch.zeros(len(rows), length, 3)
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        spans = []
        for i, (row_ids, row_spans, row_positions) in enumerate(rows):
            pad = length - len(row_ids)
            ids[i, pad:] = torch.tensor(row_ids)
            positions[i, pad:] = row_positions
            mask[i, pad:] = True
            spans.append(tuple(span.moved(pad) for span in row_spans))
        return Prompts(
            ids=ids.to(self.device),
            mask=mask.to(self.device),
            positions=positions.to(self.device),
            spans=tuple(spans),
            inputs=self.pixel_inputs(views) if views else {},
        )

    def _row(self, request: Request, views: list[View]) -> tuple[list[int], list[Span], Tensor]:
        system, prompt = self.system_for(request), request.prompt.strip()
        for name, value in (("system prompt", system), ("prompt", prompt)):
            if typed := [token for token in self._control_tokens if token in value]:
                raise ValueError(f"the {name} contains {min(typed)!r}, a control token of this VLM; remove it")

        text, where = self._chat(system, prompt, "".join(map(self.image_text, views)))
        tokens = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        parts = [(image, part) for image, view in enumerate(views) for part in view.parts]
        positions = [row for view in views for row in view.positions.tolist()]

        # each placeholder becomes the tokens of its tile; text spans are those tokens that touch the text's characters
        ids: list[int] = []
        where_ids: dict[SpanKind, list[int]] = {kind: [] for kind in where}
        spans: list[Span] = []
        token_positions: list[list[float]] = []
        for token, (start, stop) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True):
            if token in self.image_token_ids:
                image, (kind, tile, count) = parts.pop(0)
                spans.append(Span(kind, len(ids), len(ids) + count, image, tile))
                token_positions += positions[:count]
                positions = positions[count:]
                ids += [token] * count
                continue
            for kind, (first, last) in where.items():
                if start < last and stop > first:
                    where_ids[kind].append(len(ids))
            ids.append(token)
            token_positions.append([0.0, 0.0, 0.0])
        if parts:
            raise ValueError("the tokenizer splits the image placeholder; it must be a special token of the tokenizer")
        spans += [Span(kind, at[0], at[-1] + 1) for kind, at in where_ids.items() if at]
        return ids, sorted(spans, key=lambda span: span.start), torch.tensor(token_positions)

    def _chat(self, system: str, prompt: str, images: str) -> tuple[str, dict[SpanKind, tuple[int, int]]]:
        """Fills the tokenizer's chat template; returns the text and where system and instruction stand in it."""
        messages = [{"role": "system", "content": _SYSTEM}] if system else []
        messages.append({"role": "user", "content": _USER})
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        where: dict[SpanKind, tuple[int, int]] = {}
        slots = ([("system", _SYSTEM, "", system)] if system else []) + [("instruction", _USER, images, prompt)]
        for kind, slot, before, value in slots:
            if text.count(slot) != 1:
                raise ValueError(f"the VLM's chat_template does not show the {kind} exactly once")
            start = text.index(slot) + len(before)
            text = text.replace(slot, before + value)
            if value:
                where[kind] = (start, start + len(value))
        return text, where

    # From ids to states.

    def encode(self, requests: Sequence[Request], rewrites: Sequence[Sequence[int]] | None = None) -> HiddenStates:
        """Runs requests, and the token ids of a rewrite after each, through the VLM once.

        Returns:
            HiddenStates, prompts padded on the left and rewrites on the right: the layout of `verifi.rewrite`.
        Raises:
            ValueError: as `prepare`; or rewrites that do not match the requests or hold ids no text can have.
        """
        if rewrites is None:
            rewrites = [()] * len(requests)
        if len(rewrites) != len(requests):
            raise ValueError(f"{len(rewrites)} rewrites for {len(requests)} requests")
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        for row, ids in enumerate(rewrites):
            if bad := [i for i in ids if not 0 <= i < vocabulary or i in self.image_token_ids]:
                raise ValueError(f"rewrite {row}: token id {bad[0]}; expected text tokens of 0 to {vocabulary - 1}")
        return self._encode(self.prepare(requests, room=max(map(len, rewrites), default=0)), rewrites)

    def encode_empty(self) -> HiddenStates:
        """Encodes the true empty prompt: one token, the end of an empty rewrite of an empty request.

        What classifier-free guidance leads away from. The paper does not name its own; this one is ours, and short.
        """
        end = next((i for i in map(self.token_id, self.end_of_turn) if i is not None), self.stop_ids[0])
        hidden = self._encode(self.prepare([Request("")], room=1, allow_empty=True), [(end,)])
        return hidden.select("rewrite")

    @torch.no_grad()
    def _encode(self, prompts: Prompts, rewrites: Sequence[Sequence[int]]) -> HiddenStates:
        ids, mask = self._append(prompts, rewrites)
        with self.tapped(ids.shape[1]) as taps:
            self.model(
                input_ids=ids,
                attention_mask=mask.long(),
                position_ids=(mask.long().cumsum(1) - 1).clamp(min=0),
                use_cache=False,
                logits_to_keep=1,
                **prompts.inputs,
            )
        return self.collect(prompts, rewrites, taps)

    @torch.no_grad()
    def generate(
        self,
        prompts: Prompts,
        max_new_tokens: int,
        *,
        choose: Callable[[Tensor], Tensor] | None = None,
        after_step: Callable[[list[int]], list[bool]],
    ) -> Taps:
        """Decodes with transformers' own `generate` and keeps the tapped states of every forward.

        Args:
            choose: [B, vocabulary] float32 logits -> [B] token ids; None is greedy.
            after_step: is given the new token of each row, says which rows are finished; may raise to cancel.
        """
        processors = [] if choose is None else [_Forced(choose)]
        with self.tapped(prompts.ids.shape[1] + max_new_tokens) as taps:
            self.model.generate(
                input_ids=prompts.ids,
                attention_mask=prompts.mask.long(),
                generation_config=GenerationConfig(
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    num_beams=1,
                    num_return_sequences=1,
                    use_cache=True,
                    # a picture's placeholder means nothing in a rewrite, and could not be encoded again
                    suppress_tokens=list(self.image_token_ids) or None,
                ),
                logits_processor=processors,
                stopping_criteria=[_AfterStep(after_step)],
                **prompts.inputs,
            )
        return taps

    def collect(self, prompts: Prompts, rewrites: Sequence[Sequence[int]], taps: Taps) -> HiddenStates:
        """Crops what the taps caught to prompts and rewrites, and names the rewrites' spans."""
        _, mask = self._append(prompts, rewrites)
        length, prompt_length = mask.shape[1], prompts.ids.shape[1]
        assert taps.states is not None and min(taps.filled) >= length
        states = taps.states[:, :length]
        states[~mask.to(states.device)] = 0
        positions = torch.nn.functional.pad(prompts.positions, (0, 0, 0, length - prompt_length))
        spans = tuple(
            (*row, Span("rewrite", prompt_length, prompt_length + len(ids))) if len(ids) else row
            for row, ids in zip(prompts.spans, rewrites, strict=True)
        )
        return HiddenStates(states, mask, positions, spans, self.layers, self.identity)

    def _append(self, prompts: Prompts, rewrites: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        longest = max(map(len, rewrites), default=0)
        ids = torch.full((len(rewrites), longest), self.pad_id)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for row, rewrite in enumerate(rewrites):
            ids[row, : len(rewrite)] = torch.tensor(list(rewrite), dtype=torch.long)
            mask[row, : len(rewrite)] = True
        device = prompts.ids.device
        return torch.cat([prompts.ids, ids.to(device)], 1), torch.cat([prompts.mask, mask.to(device)], 1)

    @contextmanager
    def tapped(self, length: int) -> Iterator[Taps]:
        """Catches the tapped residual streams of up to `length` tokens while the context is open."""
        taps = Taps(len(self.layers), length)
        handles = []
        try:
            for slot, index in enumerate(self.layers):
                if index < self.num_layers:
                    # what enters layer i, and not what left layer i - 1: Qwen3-VL adds image features in between
                    handles.append(
                        self.decoder_layers[index].register_forward_pre_hook(taps.before(slot), with_kwargs=True)
                    )
                else:
                    handles.append(self.decoder_layers[-1].register_forward_hook(taps.after(slot)))
            yield taps
        finally:
            for handle in handles:
                handle.remove()


class Taps:
    """Collects [B, length, L, E]; each forward (prefill, then every decoded token) goes on where the last one ended."""

    def __init__(self, num_slots: int, length: int) -> None:
        self.states: Tensor | None = None
        self.filled = [0] * num_slots
        self.length = length

    def before(self, slot: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._write(slot, args[0] if args else kwargs["hidden_states"])

        return hook

    def after(self, slot: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
            self._write(slot, output if isinstance(output, Tensor) else output[0])

        return hook

    def _write(self, slot: int, hidden: Tensor) -> None:
        if self.states is None:
            self.states = hidden.new_empty(hidden.shape[0], self.length, len(self.filled), hidden.shape[-1])
        start = self.filled[slot]
        stop = min(start + hidden.shape[1], self.length)  # on MPS generate runs one step more than it returns
        self.states[:, start:stop, slot] = hidden[:, : stop - start]
        self.filled[slot] = stop


class _Forced(LogitsProcessor):
    """Leaves only the chosen token of each row, so that generate's argmax returns it."""

    def __init__(self, choose: Callable[[Tensor], Tensor]) -> None:
        self.choose = choose

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).scatter(1, self.choose(scores)[:, None], 0.0)


class _AfterStep(StoppingCriteria):
    def __init__(self, after_step: Callable[[list[int]], list[bool]]) -> None:
        self.after_step = after_step

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **kwargs) -> Tensor:
        return torch.tensor(self.after_step(input_ids[:, -1].tolist()), device=input_ids.device)
