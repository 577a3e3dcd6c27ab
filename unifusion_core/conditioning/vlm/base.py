"""A frozen VLM: requests (prompt, pictures) -> token ids with named spans -> hidden states of the tapped layers.

B batch, P prompt tokens, T tokens, L tapped layers, E VLM width. A family (`internvl.py`, ...) says how a picture is
written into the prompt and how its pixels reach the model; everything else is here.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from jinja2 import TemplateError, TemplateSyntaxError
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CompileConfig,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
)

from ..hidden_states import HiddenStates, Span, SpanKind
from ..verifi_prompts import default_system_prompt
from .prefix import Prefix, PrefixCache, cut, new_cache, pictures_digest
from .request import SLOTS, Prompts, Request
from .taps import StaticTaps, Taps
from .tiling import Layout, as_rgb, check_size, choose_grid

STATIC_STEP = 256  # tokens; static buffers grow by so many, so that a longer prompt is not compiled anew
_WORDS = {slot: f"unifusion{slot}slot" for slot in SLOTS}  # the same in a tokenizer's own chat template


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
    default_template: ClassVar[str | None] = None  # for a tokenizer without its own
    template_options: ClassVar[dict] = {}  # what else the chat template is given
    tile_size: int = 0  # px; 0 for a text-only family
    tile_side: int = 0  # tokens along a tile's side
    resample: int = Image.Resampling.BICUBIC

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
        self.accepted = set(inspect.signature(type(model).forward).parameters)
        self.decoder_layers: nn.ModuleList = model.get_decoder().layers
        self.num_layers: int = text.num_hidden_layers
        self.width: int = text.hidden_size
        self.context_length: int | None = getattr(text, "max_position_embeddings", None)
        self.system_prompt = system_prompt
        self.prefix_cache: PrefixCache | None = PrefixCache()
        self._static: dict[tuple, StaticTaps] = {}
        assert len(self.decoder_layers) == self.num_layers
        self.layers = self._checked(every_third(self.num_layers) if layers is None else layers)
        if not tokenizer.is_fast:
            raise ValueError(f"tokenizer {type(tokenizer).__name__}: a fast tokenizer is needed to locate the spans")
        self.chat_template = tokenizer.chat_template or self.default_template
        if self.chat_template is None:
            raise ValueError("the tokenizer has no chat_template; the VLM folder needs chat_template.jinja")
        if not tokenizer.chat_template and (lacking := [t for t in self.end_of_turn if self.token_id(t) is None]):
            raise ValueError(f"the tokenizer has no chat_template and lacks {lacking[0]}; not {self.family}'s")

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
        self._control_tokens -= {None, ""}
        rows = _rows(model.get_input_embeddings())
        signs = torch.signbit(rows[:: max(1, len(rows) // 64)].float()).cpu().numpy().tobytes()
        digest = hashlib.sha256(signs).hexdigest()[:12]
        self.identity = f"{model.config.model_type}-{self.num_layers}x{self.width}-{digest}"

    # What a family fills in.

    @classmethod
    def folder_options(cls, folder: Path, model: PreTrainedModel) -> dict:
        """Returns the keyword arguments for `__init__` that stand in other files of the VLM's folder."""
        return {}

    @property
    def image_token_ids(self) -> tuple[int, ...]:
        """Ids that stand for picture tokens; the first is the placeholder. Empty for a text-only family."""
        return ()

    @property
    def placeholder_id(self) -> int | None:
        """The id that `image_text` writes for each view."""
        return self.image_token_ids[0] if self.image_token_ids else None

    def layout(
        self, width: int, height: int, *, max_tiles: int, grid: tuple[int, int] | None = None, most: int | None = None
    ) -> Layout:
        """Says how a picture of `width` x `height` px is cut, without looking at its pixels.

        Args:
            max_tiles, grid: as `Request`. `most`: tokens at most, which only a family of variable resolution can heed.
        Raises:
            ValueError: a text-only family.
        """
        if not self.tile_size:
            raise ValueError(
                f"{self.family} is a text-only model and takes no images; "
                "load a VLM (InternVL, Gemma-3, Qwen2.5-VL or Qwen3-VL) or leave the images out"
            )
        grid = grid or choose_grid(width, height, self.tile_size, max_tiles)
        return Layout(grid, (self.tile_size, self.tile_size), (self.tile_side, self.tile_side))

    def image_text(self, layout: Layout) -> str:
        """Writes a picture into the prompt, with one placeholder token for each of the layout's views."""
        raise NotImplementedError

    def view_ids(self, layout: Layout) -> list[int]:
        """Returns the ids that take the place of a placeholder; those that are no picture token become markers."""
        return [self.image_token_ids[0]] * layout.tokens_per_view

    def pixel_inputs(self, pictures: Sequence[tuple[Image.Image, Layout]]) -> dict[str, Tensor]:
        """Returns the pixel tensors for `model.forward`; the pictures of all rows in order."""
        raise NotImplementedError

    def model_inputs(self, prompts: Prompts, mask: Tensor) -> dict[str, Tensor]:
        """Returns what `model.forward` and `generate` take besides ids and mask.

        Args:
            mask: [B, T] bool, of the prompts and of T - P tokens of text that follow them.
        Returns:
            Pixels, `position_ids` [B, T] (4 x [B, T] for a VLM with rotary positions of three axes) and, where the
            model reads them, token types. All are given, so that nothing depends on what the model remembers.
        """
        inputs = dict(prompts.inputs)
        types = torch.zeros_like(mask, dtype=torch.long)
        types[:, : prompts.ids.shape[1]] = prompts.image_mask
        inputs |= {name: types for name in ("token_type_ids", "mm_token_type_ids") if name in self.accepted}
        if "position_ids" in self.accepted:
            inputs["position_ids"] = self.position_ids(prompts, mask, types)
        return inputs

    def position_ids(self, prompts: Prompts, mask: Tensor, types: Tensor) -> Tensor:
        """Returns [B, T] counting each row's tokens from 0; with pictures in a M-RoPE model [4, B, T]."""
        counted = (mask.long().cumsum(1) - 1).clamp(min=0)
        rope_index = getattr(self.model.base_model, "get_rope_index", None)
        if rope_index is None or not prompts.inputs:
            return counted
        grids = {name: value for name, value in prompts.inputs.items() if name.endswith("_grid_thw")}
        if "mm_token_type_ids" in self.accepted:
            grids["mm_token_type_ids"] = types
        ids = nn.functional.pad(prompts.ids, (0, mask.shape[1] - prompts.ids.shape[1]), value=self.pad_id)
        axes, _ = rope_index(input_ids=ids, attention_mask=mask.long(), **grids)
        return torch.cat([counted[None], axes.to(counted.device)])

    @property
    def only_last_logits(self) -> dict[str, int]:
        """The argument that keeps `model.forward` from computing logits for every token, if it has one."""
        return {"logits_to_keep": 1} if "logits_to_keep" in self.accepted else {}

    @property
    def final_norm(self) -> nn.Module:
        """The decoder's last norm: from the states of layer N to what the output head is given."""
        decoder = self.model.get_decoder()
        for name in ("norm", "final_layernorm", "final_layer_norm", "ln_f"):
            if isinstance(norm := getattr(decoder, name, None), nn.Module):
                return norm
        raise ValueError(f"{type(decoder).__name__}: no final norm is known; choose a model that takes raw states")

    def tapping(self, layers: Sequence[int]) -> FrozenVLM:
        """Returns the same VLM, sharing the model, with other layers tapped.

        Raises:
            ValueError: layers that do not rise or that the VLM lacks.
        """
        twin = copy.copy(self)
        twin.layers = self._checked(layers)
        return twin

    def _checked(self, layers: Sequence[int]) -> tuple[int, ...]:
        layers = tuple(int(i) for i in layers)
        rising = layers and list(layers) == sorted(set(layers))
        if not rising or layers[0] < 0 or layers[-1] > self.num_layers:
            raise ValueError(f"layers {layers}: expected rising indices from 0 to {self.num_layers}")
        return layers

    # From requests to ids.

    @property
    def device(self) -> torch.device:
        """Where inputs go. Offloaded weights lie on the meta device between forwards; the hook knows where they run."""
        hook = getattr(self.model.get_input_embeddings(), "_hf_hook", None)
        place = getattr(hook, "execution_device", None)
        return self.model.device if place is None else torch.device(place)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def to(self, device: torch.device | str) -> FrozenVLM:
        """Moves the model and forgets the pictures it has read; returns itself."""
        if self.prefix_cache is not None:
            self.prefix_cache.clear()
        self._static.clear()
        self.model.to(device)
        return self

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token, None if the vocabulary lacks it."""
        return self.tokenizer.get_vocab().get(token)

    def control_token(self, token_id: int | None, what: str) -> str:
        """Returns the text of a control token that the family needs; ValueError if the tokenizer lacks it."""
        token = self.tokenizer.added_tokens_decoder.get(token_id)
        if token is None:
            raise ValueError(f"the tokenizer lacks the {what}, id {token_id}; it is not that of this {self.family}")
        return token.content

    def system_for(self, request: Request) -> str:
        """Returns the system prompt this request will be given; "" where its template has no slot for one."""
        if request.template is not None and SLOTS["system"] not in request.template:
            return ""
        if request.system is not None:
            return request.system.strip()
        return (self.system_prompt or default_system_prompt(len(request.images))).strip()

    def prepare(self, requests: Sequence[Request], *, room: int = 0, allow_empty: bool = False) -> Prompts:
        """Writes requests as a left-padded batch that ends with the assistant's header.

        Args:
            room: tokens that will follow; checked against the VLM's context.
            allow_empty: take a request with neither words nor pictures, as is always done behind its own template.
        Raises:
            ValueError: no request, one with neither words nor pictures, control tokens typed into a text, or too long.
        """
        if not requests:
            raise ValueError("no request given")
        rows, pictures = [], []
        for request in requests:
            if not (request.prompt.strip() or request.images or allow_empty or request.template is not None):
                raise ValueError("the prompt is empty and there is no image")
            layouts = self.layouts(request)
            rows.append(self._row(request, layouts))
            pictures += zip(map(as_rgb, request.images), layouts, strict=True)
        length = max(len(ids) for ids, _, _ in rows)
        if self.context_length is not None and length + room > self.context_length:
            longest = max(range(len(rows)), key=lambda i: len(rows[i][0]))
            raise ValueError(
                f"request {longest} is {length} tokens long and {room} more are to follow: {length + room} exceeds the "
                f"VLM's context of {self.context_length}; shorten the prompt, use fewer tiles or images, or set a "
                "token_budget"
            )
        pixels = self.pixel_inputs(pictures) if pictures else {}
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
            inputs={name: value.to(self.device) for name, value in pixels.items()},
        )

    def layouts(self, request: Request) -> list[Layout]:
        """Says how each of the request's pictures is cut, within its `token_budget`.

        Raises:
            ValueError: a text-only VLM, a picture of a size that is not accepted, or an impossible budget.
        """
        sizes = [image.size for image in request.images]
        for width, height in sizes:
            check_size(width, height)
        budget, least = request.token_budget, None
        for max_tiles in (request.max_tiles,) if request.grid else range(request.max_tiles, -1, -1):
            if max_tiles:
                found = [self.layout(*size, max_tiles=max_tiles, grid=request.grid) for size in sizes]
            else:
                found = self._squeezed(sizes, budget)
            tokens = sum(layout.num_tokens for layout in found)
            if budget is None or tokens <= budget:
                return found
            least = tokens if least is None else min(least, tokens)
        means = f"in a grid of {request.grid[0]}x{request.grid[1]} " if request.grid else ""
        raise ValueError(
            f"token_budget {budget}: {len(sizes)} images {means}need at least {least} tokens; "
            "raise the budget or use fewer images"
        )

    def _squeezed(self, sizes: list[tuple[int, int]], budget: int) -> list[Layout]:
        """Shares the budget out, smallest picture first: what that does not need is left to the others."""
        found: dict[int, Layout] = {}
        for left, i in enumerate(sorted(range(len(sizes)), key=lambda i: sizes[i][0] * sizes[i][1])):
            spent = sum(layout.num_tokens for layout in found.values())
            share = max(0, budget - spent) // (len(sizes) - left)
            found[i] = self.layout(*sizes[i], max_tiles=1, most=share)
        return [found[i] for i in range(len(sizes))]

    def count_tokens(self, request: Request) -> dict:
        """Counts the tokens of a prompt without running the model.

        Returns:
            {"total": n, "kinds": {kind of span: n}, "images": [{"tokens": n, "grid": (rows, cols), "size": (height,
            width) of each tile in px}]}; JSON-able.
        """
        layouts = self.layouts(request)
        ids, spans, _ = self._row(request, layouts)
        kinds: dict[str, int] = {}
        for span in spans:
            kinds[span.kind] = kinds.get(span.kind, 0) + len(span)
        images = [{"tokens": each.num_tokens, "grid": each.grid, "size": each.size} for each in layouts]
        return {"total": len(ids), "kinds": kinds, "images": images}

    def _row(self, request: Request, layouts: list[Layout]) -> tuple[list[int], list[Span], Tensor]:
        """Writes one request as ids, spans and positions [tokens, 3]."""
        text, where, begin = self._chat(request, layouts)
        tokens = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        views = [(image, layout, *view) for image, layout in enumerate(layouts) for view in layout.views()]

        # each placeholder becomes the tokens of its view; a token that touches a text's characters belongs to that text
        ids: list[int] = []
        labels: list[tuple[SpanKind, int | None, int | None]] = []
        positions: list[list[float]] = []
        for token, (start, stop) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True):
            if token == self.placeholder_id or token in self.image_token_ids:
                if token != self.placeholder_id or not views:
                    raise ValueError("the template holds a picture's token; write {images} where the pictures belong")
                image, layout, kind, tile, centres = views.pop(0)
                centres = iter(centres.tolist())
                for each in self.view_ids(layout):
                    is_image = each in self.image_token_ids
                    ids.append(each)
                    labels.append((kind, image, tile) if is_image else ("marker", None, None))
                    positions.append(next(centres) if is_image else [0.0, 0.0, 0.0])
                continue
            kind = "prefix" if start < begin else "marker"
            kind = next((name for name, (first, last) in where.items() if start < last and stop > first), kind)
            ids.append(token)
            labels.append((kind, None, None))
            positions.append([0.0, 0.0, 0.0])
        if views:
            raise ValueError("the tokenizer splits the image placeholder; it must be a special token of the tokenizer")
        spans, at = [], 0
        for (kind, image, tile), run in itertools.groupby(labels):
            stop = at + len(list(run))
            spans.append(Span(kind, at, stop, image, tile))
            at = stop
        return ids, spans, torch.tensor(positions).reshape(-1, 3)

    def _chat(self, request: Request, layouts: list[Layout]) -> tuple[str, dict[SpanKind, tuple[int, int]], int]:
        """Returns the chat text, where system and instruction stand in it, and where the user's content begins."""
        own = request.template is not None
        values = {
            "system": self.system_for(request),
            "images": "".join(
                request.image_label.replace("{n}", str(i)) + self.image_text(layout)
                for i, layout in enumerate(layouts, start=1)
            ),
            "prompt": request.prompt if own else request.prompt.strip(),
        }
        checked = {"system prompt": values["system"], "prompt": values["prompt"], "image_label": request.image_label}
        for name, value in checked.items():
            if typed := [token for token in self._control_tokens if token in value]:
                raise ValueError(f"the {name} contains {min(typed)!r}, a control token of this VLM; remove it")
        frame, marks = (request.template, SLOTS) if own else (self._frame(bool(values["system"])), _WORDS)

        text, where, begin = "", {}, None
        order = {frame.index(mark): slot for slot, mark in marks.items() if mark in frame}
        for _, slot in sorted(order.items()):
            before, frame = frame.split(marks[slot], 1)
            text += before
            if slot != "system" and begin is None:
                begin = len(text)
            if values[slot] and slot != "images":
                where["instruction" if slot == "prompt" else "system"] = (len(text), len(text) + len(values[slot]))
            text += values[slot]
        return text + frame, where, begin

    def _frame(self, system: bool) -> str:
        """Returns the tokenizer's chat template, filled with the words that stand for the slots."""
        messages = [{"role": "system", "content": _WORDS["system"]}] if system else []
        messages.append({"role": "user", "content": _WORDS["images"] + _WORDS["prompt"]})
        try:
            frame = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=True,
                **self.template_options,
            )
        except TemplateSyntaxError as error:
            raise ValueError(f"the VLM's chat_template is damaged ({error}); copy chat_template.jinja again") from None
        except TemplateError as error:
            raise ValueError(f"the VLM's chat_template refuses this prompt: {error}; try system=''") from None
        for slot in [*(["system"] if system else []), "images", "prompt"]:
            if frame.count(_WORDS[slot]) != 1:
                raise ValueError(f"the VLM's chat_template does not show the {slot} exactly once")
        return frame

    # From ids to states.

    def encode(
        self,
        requests: Sequence[Request],
        rewrites: Sequence[Sequence[int]] | None = None,
        *,
        reuse: bool = False,
    ) -> HiddenStates:
        """Runs requests, and the token ids of a rewrite after each, through the VLM once.

        Args:
            reuse: reads the pictures of a single request only if `prefix_cache` lacks them, and keeps them there.
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
        prompts = self.prepare(requests, room=max(map(len, rewrites), default=0))
        prefix = self._prefix(prompts) if reuse else None
        return self._encode(prompts, rewrites) if prefix is None else self._encode(prompts, rewrites, prefix)

    def encode_empty(self) -> HiddenStates:
        """Encodes the true empty prompt: one token, the end of an empty rewrite of an empty request.

        What classifier-free guidance leads away from. The paper does not name its own; this one is ours, and short.
        """
        end = next((i for i in map(self.token_id, self.end_of_turn) if i is not None), self.stop_ids[0])
        hidden = self._encode(self.prepare([Request("")], room=1, allow_empty=True), [(end,)])
        return hidden.select("rewrite")

    @torch.no_grad()
    def _encode(
        self, prompts: Prompts, rewrites: Sequence[Sequence[int]], prefix: Prefix | None = None
    ) -> HiddenStates:
        ids, mask = self._append(prompts, rewrites)
        with self.tapped(ids.shape[1], prefix) as taps:
            self.model(
                input_ids=ids if prefix is None else ids[:, prefix.length :],
                attention_mask=mask.long(),
                use_cache=prefix is not None,
                **self.only_last_logits,
                **_after(prefix, self.model_inputs(prompts, mask), ids.shape[1]),
            )
        return self.collect(prompts, rewrites, taps)

    @torch.no_grad()
    def _prefix(self, prompts: Prompts) -> Prefix | None:
        """Returns the row up to the end of its last picture, remembered or read now; None without a prefix cache.

        Batches, prompts without pictures and models with a recurrent state go without.
        """
        kept = self.prefix_cache
        ends = [span.stop for row in prompts.spans for span in row if span.image is not None]
        if kept is None or not kept.entries or len(prompts.ids) > 1 or not ends or not bool(prompts.mask.all()):
            return None
        length, inputs = max(ends), self.model_inputs(prompts, prompts.mask)
        ids = prompts.ids[:, :length]
        names = (self.identity, self.layers, self.dtype, self.device, pictures_digest(inputs))
        key = (*names, *ids.flatten().tolist())
        prefix = kept.get(key)
        if prefix is not None:
            return prefix
        cache = new_cache(self.model.config.get_text_config())
        if cache is None:
            return None
        kept.make_room()
        with self.tapped(length) as taps:
            self.model(
                input_ids=ids,
                attention_mask=prompts.mask[:, :length].long(),
                past_key_values=cache,
                use_cache=True,
                **self.only_last_logits,
                **{**inputs, **cut(inputs, 0, length)},
            )
        prefix = Prefix.of(cache, taps.states)
        kept.put(key, prefix)
        return prefix

    @torch.no_grad()
    def generate(
        self,
        prompts: Prompts,
        max_new_tokens: int,
        *,
        choose: Callable[[Tensor], Tensor] | None = None,
        after_step: Callable[[list[int]], list[bool]],
        reuse: bool = True,
        static: bool | CompileConfig = False,
    ) -> Taps:
        """Decodes with transformers' own `generate` and keeps the tapped states of every forward.

        Args:
            choose: [B, vocabulary] float32 logits -> [B] token ids; None is greedy.
            after_step: is given the new token of each row, says which rows are finished; may raise to cancel.
            reuse: as `encode`.
            static: keeps keys, values and states in buffers of a fixed size, with which transformers compiles the
                decoding on CUDA (elsewhere if a CompileConfig insists). Pictures are then read anew.
        """
        processors = [] if choose is None else [_Forced(choose)]
        prefix = self._prefix(prompts) if reuse and not static else None
        length = prompts.ids.shape[1] + max_new_tokens
        fixed = self._static_taps(len(prompts.ids), length) if static else None
        sizes = {} if fixed is None else {"cache_implementation": "static", "max_cache_len": fixed.length}
        with self.tapped(length, prefix, fixed) as taps:
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
                    compile_config=None if isinstance(static, bool) else static,
                    **sizes,
                ),
                logits_processor=processors,
                stopping_criteria=[_AfterStep(after_step)],
                **_after(prefix, self.model_inputs(prompts, prompts.mask)),
            )
        return taps if fixed is None else fixed.taken()

    def _static_taps(self, rows: int, length: int) -> StaticTaps:
        """The buffers of the last run where they fit.

        A compiled forward holds on to the hooks it was compiled with, and nothing tells it that they have changed: new
        buffers make everything be compiled anew.
        """
        length = -(-length // STATIC_STEP) * STATIC_STEP
        key = self.layers, rows, length, self.device, self.dtype
        if key not in self._static:
            torch._dynamo.reset()
            self._static.clear()
            self._static[key] = StaticTaps(len(self.layers), length)
        self._static[key].restart()
        return self._static[key]

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
    def tapped(self, length: int, prefix: Prefix | None = None, taps: Taps | None = None) -> Iterator[Taps]:
        """Catches the tapped residual streams of up to `length` tokens while the context is open.

        Those of a prefix stand before them, as if the model had just read it. `taps`: what catches them, if no new one.
        """
        taps = taps or Taps(len(self.layers), length)
        if prefix is not None:
            taps.start_with(prefix.states)
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


def _rows(embeddings: nn.Module) -> Tensor:
    """Returns the embeddings' weight, fetched from disk where accelerate has offloaded it."""
    if not embeddings.weight.is_meta:
        return embeddings.weight
    from accelerate.utils import align_module_device  # transformers has needed it to offload

    with align_module_device(embeddings, "cpu"):
        return embeddings.weight.detach().clone()


def _after(prefix: Prefix | None, inputs: dict[str, Tensor], stop: int | None = None) -> dict[str, Any]:
    """Inputs of the tokens behind a prefix; `stop` cuts what is one per token to them, where `generate` would not."""
    if prefix is None:
        return inputs
    positions = {"position_ids": inputs["position_ids"]} if "position_ids" in inputs else {}
    if stop is not None:
        positions = cut(positions, prefix.length, stop)
    return {"past_key_values": prefix.fresh_cache(), **positions}


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
