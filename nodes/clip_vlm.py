"""A VLM out of the text encoder that a CLIP already holds: weights, patches and place in memory stay the CLIP's.

Core's decoder is run as it is, but not by core's `generate`, which keeps no states, gives Qwen2.5-VL's pictures the
positions of text and stops at ids that model lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import comfy.model_management as management
import comfy.ops
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from comfy.text_encoders import llama, qwen3vl, qwen_vl
from comfy.text_encoders.spiece_tokenizer import SPieceTokenizer
from torch import Tensor, nn

from ..unifusion_core.checkpoint import load_tensors, read_table
from ..unifusion_core.conditioning.hidden_states import HiddenStates
from ..unifusion_core.conditioning.vlm.base import FrozenVLM, Taps
from ..unifusion_core.conditioning.vlm.gemma3 import Gemma3
from ..unifusion_core.conditioning.vlm.llama import GemmaText, QwenText
from ..unifusion_core.conditioning.vlm.qwen_vl import Qwen3VL, Qwen25VL
from ..unifusion_core.conditioning.vlm.request import Prompts
from .gemma_tokens import CONTROL, GemmaTokens
from .memory import ManagedVLM

FITTING = "Qwen3-VL, Qwen2.5-VL, Gemma-3 or (text only) Qwen3"
LOADERS = "core's Load CLIP with such a file, for instance qwen3vl_4b of type krea2"
QWEN_TOKENS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}


@dataclass(eq=False)
class _Row:
    """One sequence on its way through the decoder, unpadded. `start` is where it begins in the padded batch."""

    start: int
    embeds: Tensor  # [1, T, E]
    pictures: list[dict]
    cache: list | None = None
    next_position: int | None = None  # None: counted from the cache


class ClipVLM(FrozenVLM):
    """Runs core's decoder with one dtype from the picture's tokens to the last written one.

    Rows of a batch take their steps together but are read one by one, so nothing is padded. A prefix is not remembered:
    core's decoder cannot go on from one by more than a token at a time.

    Args:
        clip: core's CLIP. `part`: its SDClipModel whose transformer is run.
        dtype: of the pass; None is what core generates with on the CLIP's device.
    """

    model_type: str

    def __init__(self, clip: comfy.sd.CLIP, part: nn.Module, tokenizer, *, dtype: torch.dtype | None = None) -> None:
        self.patcher, self.transformer = clip.patcher, part.transformer
        self.decoder = self.transformer.model
        if dtype is None:
            bf16 = management.should_use_bf16(self.patcher.load_device)
            dtype = torch.bfloat16 if bf16 else torch.float32
        super().__init__(_Facade(self, dtype), tokenizer)
        self.chat_template = self.default_template
        self.prefix_cache = None
        self.head: _FileHead | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about this CLIP as a VLM, one line each."""
        notes = [f"{self.identity}, computes in {str(self.dtype).removeprefix('torch.')}"]
        if not self.tile_size:
            notes.append("text only: it reads no pictures")
        if not self.can_write:
            notes.append("it has no final norm: it encodes, but cannot rewrite")
        return tuple(notes)

    @property
    def can_write(self) -> bool:
        return self.decoder.norm is not None

    # What core's families differ in.

    def model_config(self) -> dict:
        """What the family reads of a transformers config besides the sizes of the text model."""
        return {}

    def look(self, pixels: dict[str, Tensor]) -> list[dict]:
        """Runs the vision tower over the pictures of all rows; one dict per view, with its `tokens` [n, E]."""
        raise NotImplementedError

    def places(self, row: _Row) -> dict[str, Tensor]:
        """Returns what the decoder is told about a row's pictures at prefill; only for a row that has any."""
        return {}

    # From ids to states.

    @torch.no_grad()
    def _encode(self, prompts: Prompts, rewrites: Sequence[Sequence[int]]) -> HiddenStates:
        ids, mask = self._append(prompts, rewrites)
        taps = self._taps(len(ids), ids.shape[1])
        with self._loaded(ids.shape[1], len(ids)):
            for i, row in enumerate(self._rows(prompts, ids, mask)):
                self._prefill(row, taps.states[i])
        taps.filled = [ids.shape[1]] * len(self.layers)
        return self.collect(prompts, rewrites, taps)

    @torch.no_grad()
    def generate(
        self,
        prompts: Prompts,
        max_new_tokens: int,
        *,
        choose: Callable[[Tensor], Tensor] | None = None,
        after_step: Callable[[list[int]], list[bool]],
        reuse: bool = True,
    ) -> Taps:
        """Decodes through core's key-value cache and keeps the tapped states of every forward; as `FrozenVLM`'s.

        Args:
            reuse: without meaning here, see the class.
        Raises:
            ValueError: a text encoder that was cut down and cannot write.
        """
        if not self.can_write:
            raise ValueError(
                "this CLIP's text encoder was saved without its final norm and cannot write: "
                "set sampling to off, or load the whole model"
            )
        length = prompts.ids.shape[1]
        taps = self._taps(len(prompts.ids), length + max_new_tokens)
        with self._loaded(length + max_new_tokens, len(prompts.ids), writing=True):
            rows = self._rows(prompts, prompts.ids, prompts.mask)
            for row in rows:
                row.cache = self.transformer.init_kv_cache(
                    1, row.embeds.shape[1] + max_new_tokens, self.device, self.dtype
                )
            logits = [self._logits(self._prefill(row, taps.states[i])) for i, row in enumerate(rows)]
            finished = [False] * len(rows)
            for step in range(max_new_tokens):
                scores = torch.cat(logits)
                chosen = (scores.argmax(-1) if choose is None else choose(scores)).tolist()
                chosen = [self.pad_id if done else token for token, done in zip(chosen, finished, strict=True)]
                finished = after_step(chosen)
                if all(finished) or step + 1 == max_new_tokens:
                    break
                for i, row in enumerate(rows):
                    if not finished[i]:
                        logits[i] = self._logits(self._step(row, chosen[i], taps.states[i], length + step))
        taps.filled = [length + step] * len(self.layers)
        return taps

    def _rows(self, prompts: Prompts, ids: Tensor, mask: Tensor) -> list[_Row]:
        views = iter(self.look(prompts.inputs) if prompts.inputs else [])
        rows = []
        for i, spans in enumerate(prompts.spans):
            inside = mask[i].nonzero().squeeze(1)
            start = int(inside[0])
            embeds, pictures = self._embed(ids[i, inside][None]), []
            for span in spans:
                if span.image is None:
                    continue
                view = next(views)
                at = span.start - start
                assert len(view["tokens"]) == len(span)
                embeds[0, at : at + len(span)] = view["tokens"].to(embeds)
                # the shape in which core describes an embedded picture
                pictures.append({"type": "image", "index": at, "size": len(span), "extra": view.get("extra")})
            rows.append(_Row(start, embeds, pictures))
        return rows

    def _embed(self, ids: Tensor) -> Tensor:
        return self.decoder.embed_tokens(ids, out_dtype=torch.float32).to(self.dtype)

    def _prefill(self, row: _Row, states: Tensor) -> Tensor:
        told = self.places(row) if row.pictures else {}
        if told.get("position_ids") is not None:
            row.next_position = int(told["position_ids"][:, -1].max()) + 1
        return self._forward(row, row.embeds, states, row.start, told)

    def _step(self, row: _Row, token: int, states: Tensor, at: int) -> Tensor:
        told = {}
        if row.next_position is not None:
            told["position_ids"] = torch.tensor([[row.next_position]], device=self.device)
            row.next_position += 1
        return self._forward(row, self._embed(torch.tensor([[token]], device=self.device)), states, at, told)

    def _forward(self, row: _Row, embeds: Tensor, states: Tensor, at: int, told: dict[str, Tensor]) -> Tensor:
        """Runs the decoder, which overwrites `embeds`; writes states [T, L, E] from `at` on and returns the output."""
        count = embeds.shape[1]
        with self._raw_end() as end:
            output, tapped, *cache = self.decoder(
                None,
                embeds=embeds,
                past_key_values=row.cache,
                intermediate_output=list(self.layers),
                final_layer_norm_intermediate=False,
                **told,
            )
        if cache:
            row.cache = cache[0]
        states[at : at + count] = tapped[0].transpose(0, 1)
        if self.layers[-1] == self.num_layers and end:
            states[at : at + count, -1] = end[0][0]
        return output

    @contextmanager
    def _raw_end(self) -> Iterator[list[Tensor]]:
        """Catches what enters the final norm: core gives index N only after it."""
        caught: list[Tensor] = []
        if self.decoder.norm is None:
            yield caught
            return
        handle = self.decoder.norm.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
        try:
            yield caught
        finally:
            handle.remove()

    def _logits(self, output: Tensor) -> Tensor:
        """[1, T, E] -> [1, vocabulary] float32 of the last token; pictures' tokens cannot be written."""
        last = output[:, -1:]
        logits = (self.transformer.logits(last) if self.head is None else self.head.linear(last))[:, -1].float()
        for token in self.image_token_ids:
            logits[:, token] = -torch.inf
        return logits

    def _taps(self, rows: int, length: int) -> Taps:
        taps = Taps(len(self.layers), length)
        taps.states = torch.empty(rows, length, len(self.layers), self.width, device=self.device, dtype=self.dtype)
        return taps

    @contextmanager
    def _loaded(self, length: int, rows: int, writing: bool = False) -> Iterator[None]:
        """Puts the CLIP on its device, with room for the pass."""
        config = self.decoder.config
        size = management.dtype_size(self.dtype)
        cache = 2 * self.num_layers * config.num_key_value_heads * config.head_dim
        wide = 3 * config.intermediate_size + 8 * self.width + 2 * len(self.layers) * self.width
        need = size * (rows * length * (cache + len(self.layers) * self.width) + length * (wide + length))
        patchers = [self.patcher]
        if writing and self.head is not None:
            patchers.append(self.head.patcher(self.patcher))
        management.load_models_gpu(patchers, memory_required=need)
        with management.cuda_device_context(self.device):
            yield


class _QwenEyes(ClipVLM):
    def model_config(self) -> dict:
        visual = self.transformer.visual
        vision = SimpleNamespace(
            patch_size=visual.patch_size,
            spatial_merge_size=visual.spatial_merge_size,
            temporal_patch_size=visual.patch_embed.temporal_patch_size,
        )
        return QWEN_TOKENS | {"vision_config": vision}

    def look(self, pixels: dict[str, Tensor]) -> list[dict]:
        grids = pixels["image_grid_thw"].cpu()  # core's towers count on it
        seen = self.transformer.visual(pixels["pixel_values"].to(self.device, torch.float32), grids)
        tokens, *deepstack = seen if isinstance(seen, tuple) else (seen,)
        counts = (grids.prod(-1) // self.merge**2).tolist()
        layers = [layer.split(counts) for layer in deepstack[0]] if deepstack else []
        return [
            {"tokens": each, "extra": {"grid": grids[i : i + 1], "deepstack": [layer[i] for layer in layers]}}
            for i, each in enumerate(tokens.split(counts))
        ]


class ClipQwen3VL(_QwenEyes, Qwen3VL):
    """Qwen3-VL; DeepStack's additions are part of the states."""

    model_type = "qwen3_vl"

    def places(self, row: _Row) -> dict[str, Tensor]:
        positions, where, deepstack = self.transformer.build_image_inputs(row.embeds, row.pictures)
        return {"position_ids": positions, "visual_pos_masks": where, "deepstack_embeds": deepstack}


class ClipQwen25VL(_QwenEyes, Qwen25VL):
    """Qwen2.5-VL, whose output head core leaves in the file."""

    model_type = "qwen2_5_vl"

    def __init__(self, clip: comfy.sd.CLIP, *args, **kwargs) -> None:
        super().__init__(clip, *args, **kwargs)
        self.head = _FileHead.of(clip, (self.decoder.vocab_size, self.width))

    @property
    def notes(self) -> tuple[str, ...]:
        if self.head is None:
            more = "no lm_head at hand: words are chosen by the embeddings, unlike in Qwen's own model, and may be poor"
        else:
            more = f"words are chosen by the lm_head in {Path(self.head.path).name}, which ComfyUI leaves out"
        return (*super().notes, more)

    def places(self, row: _Row) -> dict[str, Tensor]:
        length = row.embeds.shape[1]
        return {"position_ids": qwen_vl.qwen2vl_mrope_position_ids(row.pictures, length, self.device)}


class ClipGemma3(ClipVLM, Gemma3):
    """Gemma-3 with eyes. The tokens of a picture see each other: so in Google's model, but not in core's encode."""

    model_type = "gemma3"

    @property
    def notes(self) -> tuple[str, ...]:
        return (*super().notes, "in core's vision tower the norms have eps 1e-5, in Google's 1e-6")

    def model_config(self) -> dict:
        return {
            "image_token_id": CONTROL["<image_soft_token>"],
            "boi_token_id": CONTROL["<start_of_image>"],
            "eoi_token_id": CONTROL["<end_of_image>"],
            "mm_tokens_per_image": self.decoder.config.mm_tokens_per_image,
            "vision_config": SimpleNamespace(image_size=self.transformer.image_size),
        }

    def look(self, pixels: dict[str, Tensor]) -> list[dict]:
        seen = self.transformer.vision_model(pixels["pixel_values"].to(self.device, torch.float32))[0]
        return [{"tokens": tokens} for tokens in self.transformer.multi_modal_projector(seen)]

    def _prefill(self, row: _Row, states: Tensor) -> Tensor:
        def open_up(module: nn.Module, args: tuple, kwargs: dict) -> None:
            for picture in row.pictures:
                inside = slice(picture["index"], picture["index"] + picture["size"])
                kwargs["attention_mask"][..., inside, inside] = 0  # one mask serves all layers

        handle = self.decoder.layers[0].register_forward_pre_hook(open_up, with_kwargs=True)
        try:
            return super()._prefill(row, states)
        finally:
            handle.remove()


class ClipQwenText(ClipVLM, QwenText):
    """Qwen3 without eyes (Z-Image, FLUX.2 Klein), and the language part of Qwen3-VL (Ideogram 4)."""

    @property
    def model_type(self) -> str:
        return "qwen3_vl" if self.decoder.config.rope_theta == llama.Qwen3VL_8BConfig.rope_theta else "qwen3"

    @property
    def notes(self) -> tuple[str, ...]:
        thinks = self.can_write and self.model_type == "qwen3"
        return super().notes + (("it may think before it writes: limit that at UniFusion Rewrite",) if thinks else ())


class ClipGemmaText(ClipVLM, GemmaText):
    """Gemma-3 without eyes."""

    model_type = "gemma3_text"


FAMILIES: dict[type[nn.Module], type[ClipVLM]] = {
    qwen3vl.Qwen3VL: ClipQwen3VL,
    llama.Qwen25_7BVLI: ClipQwen25VL,
    llama.Gemma3_12B: ClipGemma3,
    llama.Gemma3_4B_Vision: ClipGemma3,
    llama.Gemma3_4B: ClipGemmaText,
    llama.Qwen3_4B: ClipQwenText,
    llama.Qwen3_8B: ClipQwenText,
    llama.Qwen3_06B: ClipQwenText,
}


class ManagedClipVLM(ManagedVLM):
    """A ClipVLM on a UNIFUSION_VLM socket: each of its passes loads the CLIP itself, whole or in part."""

    def ready(self) -> ClipVLM:
        return self.vlm


def vlm_from_clip(clip: comfy.sd.CLIP, dtype: torch.dtype | None = None) -> ManagedClipVLM:
    """Finds the language model in a CLIP and makes a VLM of it.

    Raises:
        ValueError: a CLIP without one that can be used, or whose prompts a schedule of LoRA hooks changes.
    """
    if clip.patcher.forced_hooks is not None and clip.use_clip_schedule:
        raise ValueError(
            "this CLIP follows a schedule of hooks, which a rewrite cannot; connect it before Set CLIP Hooks"
        )
    model = clip.cond_stage_model
    parts = {"": model, **dict(model.named_children())}
    for name, part in parts.items():
        for kind, family in FAMILIES.items():
            if isinstance(getattr(part, "transformer", None), kind):
                vlm = family(clip, part, _tokenizer(clip.tokenizer, name), dtype=dtype)
                return ManagedClipVLM(vlm, clip.patcher)
    inner = [type(part.transformer).__name__ for part in parts.values() if hasattr(part, "transformer")]
    raise ValueError(
        f"this CLIP is {type(model).__name__} ({', '.join(inner) or 'no transformer'}), no language model that can "
        f"rewrite; connect a CLIP of {FITTING}: {LOADERS}"
    )


def _tokenizer(holder, name: str):
    """The tokenizer of one part of a CLIP, under core's wrappers, which do not always give it the part's name."""
    if not hasattr(holder, "tokenizer"):
        holder = getattr(holder, name if hasattr(holder, name) else holder.clip)
    inner = holder.tokenizer
    return GemmaTokens(inner.tokenizer) if isinstance(inner, SPieceTokenizer) else inner


class _Facade:
    """What FrozenVLM reads of a transformers model, over core's; `ClipVLM` runs the decoder itself."""

    def __init__(self, vlm: ClipVLM, dtype: torch.dtype) -> None:
        config = vlm.decoder.config
        stops = list(getattr(config, "stop_tokens", []))
        self._decoder, self.device, self.dtype = vlm.decoder, vlm.patcher.load_device, dtype
        self.config = SimpleNamespace(model_type=vlm.model_type, get_text_config=lambda: config, **vlm.model_config())
        self.generation_config = SimpleNamespace(eos_token_id=stops)

    def forward(self) -> None:
        raise NotImplementedError

    def eval(self) -> _Facade:
        return self

    def requires_grad_(self, wanted: bool) -> _Facade:
        return self

    def get_decoder(self) -> nn.Module:
        return self._decoder

    def get_input_embeddings(self) -> SimpleNamespace:
        return SimpleNamespace(weight=_Rows(self._decoder.embed_tokens))


class _Rows:
    """The embedding's rows, read through the layer itself, which may be quantised or wait on disk."""

    is_meta = False

    def __init__(self, embedding: nn.Module) -> None:
        self.embedding, self.shape = embedding, (embedding.num_embeddings, embedding.embedding_dim)

    def __len__(self) -> int:
        return self.shape[0]

    @torch.no_grad()
    def __getitem__(self, rows: slice) -> Tensor:
        return self.embedding(torch.arange(len(self))[rows], out_dtype=torch.float32)


class _FileHead:
    """The output head that core does not load, read from the CLIP's own file when it is first needed."""

    def __init__(self, path: str, name: str) -> None:
        self.path, self.name = path, name
        self.linear: nn.Module | None = None
        self._patcher: ModelPatcher | None = None

    @classmethod
    def of(cls, clip: comfy.sd.CLIP, shape: tuple[int, int]) -> _FileHead | None:
        made = clip.patcher.cached_patcher_init
        if made is None or made[0] is not comfy.sd.load_clip_model_patcher:
            return None
        for path in made[1][0]:
            if not str(path).endswith(".safetensors"):
                continue
            table = read_table(path)
            for name in {"lm_head.weight", "model.lm_head.weight"} & table.keys():
                if table[name] in (("F32", shape), ("F16", shape), ("BF16", shape)):
                    return cls(str(path), name)
        return None

    def patcher(self, like: ModelPatcher) -> ModelPatcher:
        if self._patcher is None:
            weight = load_tensors(self.path, only=self.name.__eq__)[self.name]
            rows, width = weight.shape
            self.linear = comfy.ops.manual_cast.Linear(width, rows, bias=False, device="meta", dtype=weight.dtype)
            self.linear.weight = nn.Parameter(weight, requires_grad=False)
            holder = nn.Module()
            holder.add_module("lm_head", self.linear)
            self._patcher = ModelPatcher(holder, load_device=like.load_device, offload_device=like.offload_device)
        return self._patcher
