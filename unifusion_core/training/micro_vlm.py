"""Recipe `micro-vlm`: a tiny InternVL that captions, rewrites and plans edits in the micro-world, then stays frozen.

Beside the language-model loss it learns through throw-away linear heads, which stand in for the pretraining that a
real VLM brings: image tokens tell their pixels (from the tapped layers) and their cell's attributes (from the
projector), and the last word of each object's phrase tells its attributes and its cell (from the tapped layers).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from random import Random

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedTokenizerFast

from ..microworld.caption import caption
from ..microworld.edits import sample_composition, sample_edit
from ..microworld.phrases import CAPTION_PATTERNS
from ..microworld.prompts import sample_prompt
from ..microworld.render import render, render_array
from ..microworld.scene import CELL, COLORS, MARKS, SHAPES, SIZES, STRIPES, Scene, sample_scene
from ..microworld.vocabulary import WORD_PATTERN, words
from ..presets import micro
from .loop import LoopSpec, fit

TAPS, WIDTH = micro().layers, micro().lap.width  # every third layer, at Krea 2's residue
TILE = 64  # px
TOKENS = 16  # per tile
SYSTEM_PROMPT = "describe the scene in detail"
SPECIAL = ("<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} {{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
TEXT_MIX = {"full": 0.15, "short": 0.28, "indirect": 0.35, "count": 0.09, "relation": 0.13}
EDIT_MIX = {"recolor": 6, "remove": 10, "add": 4, "move": 9, "resize": 5, "reshape": 7, "background": 3}
IMAGE_SHARE = 0.6  # of the rows that carry a text
MOST_CELLS = 4  # along one side of a captioned canvas or of a tile's tokens

LOOP = LoopSpec(
    steps=6000,
    batch_size=42,
    rate=2e-3,
    muon_rate=2.5e-3,
    warmup=60,
    decay_fraction=0.5,
    ema_decay=0.998,
    save_minutes=3,
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the micro-world's words, lower-cased; strangers become `<unk>`."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, "system", "user", "assistant", *words()))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="removed", invert=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<img>", "</img>", "<IMG_CONTEXT>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(tokenizer: PreTrainedTokenizerFast) -> InternVLForConditionalGeneration:
    config = InternVLConfig(
        vision_config={
            "hidden_size": WIDTH,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 2 * WIDTH,
            "image_size": TILE,
            "patch_size": 8,
            "attention_bias": True,
            "layer_scale_init_value": 1.0,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "num_hidden_layers": 11,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 2 * WIDTH,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=TOKENS,
        downsample_ratio=0.5,
        tie_word_embeddings=True,
    )
    return InternVLForConditionalGeneration(config)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One training sequence: pictures as uint8 tiles [64, 64, 3], a prompt, and the text to write (None: only look)."""

    tiles: tuple[np.ndarray, ...] = ()
    prompt: str = ""
    target: Scene | None = None
    scenes: tuple[Scene, ...] = ()  # what each tile shows, where it is one whole 64-px scene
    per_image: tuple[int, ...] = ()  # tiles per image; () means one each


@dataclass(frozen=True)
class Rows:
    """Rows in one right-padded batch; a causal model needs no mask for that."""

    ids: Tensor
    labels: Tensor
    pixels: Tensor | None
    attributes: Tensor | None  # [tiles, 16, 7] class indices, -1 where unknown
    phrases: Tensor = field(default_factory=lambda: torch.zeros(0, 7, dtype=torch.long))  # row, place, classes

    def to(self, device: torch.device | str, **_) -> Rows:
        """The same rows on a device, as accelerate asks for them."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Rows(**{name: None if value is None else value.to(device) for name, value in moved.items()})


class Collator:
    """Rows → tensors, with the very ids that inference builds (tests hold the two together)."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.word = tokenizer.get_vocab()
        start, end = self.word["<|im_start|>"], self.word["<|im_end|>"]
        self.head = [start, self.word["system"], *self.encode(SYSTEM_PROMPT), end, start, self.word["user"]]
        self.middle = [end, start, self.word["assistant"]]
        self.end = end
        self.image = [self.word["<img>"], *[self.word["<IMG_CONTEXT>"]] * TOKENS, self.word["</img>"]]

    def encode(self, text: str) -> list[int]:
        return [self.word[word] for word in text.replace(",", " , ").split()]

    def images(self, row: Row) -> list[int]:
        ids: list[int] = []
        for tiles in row.per_image or (1,) * len(row.tiles):
            ids += [self.image[0], *self.image[1:-1] * tiles, self.image[-1]]
        return ids

    def length(self, row: Row) -> int:
        return 18 * len(row.tiles) + len(row.prompt.split()) + (0 if row.target is None else 7 * len(row.target.things))

    def __call__(self, rows: list[Row]) -> Rows:
        sequences, labels, phrases = [], [], []
        for index, row in enumerate(rows):
            ids = self.head + self.images(row) + self.encode(row.prompt) + self.middle
            target = self.encode(caption(row.target)) + [self.end] if row.target is not None else []
            if row.target is not None:
                at = len(ids) + 12  # six words and a colon, then `a size color shape at position ,`
                for number, thing in enumerate(row.target.things):
                    kinds = SHAPES.index(thing.shape), tuple(COLORS).index(thing.color), tuple(SIZES).index(thing.size)
                    phrases.append((index, at + 7 * number, *kinds, thing.row, thing.column))
            sequences.append(ids + target)
            labels.append([-100] * len(ids) + target)
        longest = max(map(len, sequences))
        tiles = [tile for row in rows for tile in row.tiles]
        return Rows(
            torch.tensor([ids + [0] * (longest - len(ids)) for ids in sequences]),
            torch.tensor([ids + [-100] * (longest - len(ids)) for ids in labels]),
            normalize(np.stack(tiles)) if tiles else None,
            torch.from_numpy(
                np.stack([scene_attributes(s) for row in rows for s in row.scenes or (None,) * len(row.tiles)])
            )
            if tiles
            else None,
            torch.tensor(phrases, dtype=torch.long).reshape(-1, 7),
        )


def normalize(tiles: np.ndarray) -> Tensor:
    """uint8 [n, H, W, 3] → [n, 3, H, W] in -1..1."""
    return torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 127.5 - 1


def scene_attributes(scene: Scene | None) -> np.ndarray:
    """[16, 7]: each image token's row and column, then its cell's shape, colour, size, stripes and mark.

    Of the latter, 0 is "nothing there" and -1 unknown.
    """
    table = np.zeros((4, 4, 7), np.int64)
    table[:, :, 0], table[:, :, 1] = np.indices((4, 4))
    if scene is None:
        table[:, :, 2:] = -1
        return table.reshape(16, 7)
    for t in scene.things:
        table[2 * t.row : 2 * t.row + 2, 2 * t.column : 2 * t.column + 2, 2:] = (
            1 + SHAPES.index(t.shape),
            1 + tuple(COLORS).index(t.color),
            1 + tuple(SIZES).index(t.size),
            1 + STRIPES.index(t.detail.stripes),
            1 + MARKS.index(t.detail.mark),
        )
    return table.reshape(16, 7)


def text_rows(rng: Random, count: int) -> list[Row]:
    rows = []
    for _ in range(count):
        kind = rng.choices(tuple(TEXT_MIX), tuple(TEXT_MIX.values()))[0]
        if kind == "full" and rng.random() < 0.4:  # a finished caption is passed on as it is
            grid = rng.choice(((2, 2), (2, 2), (2, 3), (3, 2)))
            scene = sample_scene(rng, rows=grid[0], columns=grid[1], count=rng.choice((1, 2, 3, 4)))
            rows.append(Row(prompt=caption(scene), target=scene))
        else:
            prompt = sample_prompt(rng, kind)
            rows.append(Row(prompt=prompt.text, target=prompt.scene))
    return rows


def image_rows(rng: Random, count: int) -> list[Row]:
    rows = []
    for _ in range(count):
        draw = rng.random()
        if draw < 0.15:
            scene = sample_scene(rng, count=rng.choice((1, 2, 3, 3, 4)))
            prompt = rng.choice(CAPTION_PATTERNS["train"])
            rows.append(Row(tiles=(render_array(scene),), scenes=(scene,), prompt=prompt, target=scene))
        elif draw < 0.75:
            edit = sample_edit(rng, rng.choices(tuple(EDIT_MIX), tuple(EDIT_MIX.values()))[0])
            rows.append(
                Row(
                    tiles=(render_array(edit.source),),
                    scenes=(edit.source,),
                    prompt=edit.instruction,
                    target=edit.target,
                )
            )
        else:
            both = sample_composition(rng)
            rows.append(
                Row(
                    tiles=tuple(render_array(s) for s in both.references),
                    scenes=both.references,
                    prompt=both.instruction,
                    target=both.target,
                )
            )
    return rows


def looking_rows(rng: Random, tiled: bool) -> list[Row]:
    """Pictures without a text: crops at many scales, or whole tiled pictures of a larger canvas."""
    if tiled:
        scene = sample_scene(rng, rows=4, columns=4, count=rng.randint(3, 12))
        side, image = rng.choice((2, 2, 3)), render(scene)
        big = np.asarray(image.resize((side * TILE, side * TILE), 3))
        tiles = [
            big[y : y + TILE, x : x + TILE] for y in range(0, side * TILE, TILE) for x in range(0, side * TILE, TILE)
        ]
        tiles.append(np.asarray(image.resize((TILE, TILE), 3)))
        return [Row(tiles=tuple(tiles), per_image=(len(tiles),))]
    rows = []
    for _ in range(8):
        scene = sample_scene(rng, rows=4, columns=4, count=rng.randint(4, 12))
        side = rng.choice((64, 64, 43, 43, 128, 85))
        x, y = rng.randint(0, 4 * CELL - side), rng.randint(0, 4 * CELL - side)
        crop = render(scene).crop((x, y, x + side, y + side)).resize((TILE, TILE), 3)
        rows.append(Row(tiles=(np.asarray(crop),)))
    return rows


PHRASE_CLASSES = (len(SHAPES), len(COLORS), len(SIZES), MOST_CELLS, MOST_CELLS)
LOOK_CLASSES = (MOST_CELLS, MOST_CELLS, *(1 + len(table) for table in (SHAPES, COLORS, SIZES, STRIPES, MARKS)))


class Trainee(nn.Module):
    """The VLM with its throw-away heads."""

    def __init__(self, vlm: InternVLForConditionalGeneration) -> None:
        super().__init__()
        self.vlm = vlm
        width = len(TAPS) * WIDTH
        self.tap_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.pixel_head = nn.Linear(width, 3 * (TILE // 4) ** 2)
        self.phrase_head = nn.Linear(width, sum(PHRASE_CLASSES))
        self.look_head = nn.Linear(WIDTH, sum(LOOK_CLASSES))

    def forward(self, parts: list[Rows]) -> dict[str, Tensor]:
        """Losses averaged over the parts that have them."""
        sums: dict[str, list[Tensor]] = {}
        for rows in parts:
            for key, value in self.losses(rows).items():
                sums.setdefault(key, []).append(value)
        return {key: torch.stack(values).mean() for key, values in sums.items()}

    def losses(self, rows: Rows) -> dict[str, Tensor]:
        with tapped(self.vlm) as taps:
            extra = {} if rows.pixels is None else {"pixel_values": rows.pixels}
            hidden = self.vlm.model(input_ids=rows.ids, use_cache=False, **extra).last_hidden_state
        losses = {}
        places = rows.labels[:, 1:] != -100
        if places.any():
            logits = self.vlm.lm_head(hidden[:, :-1][places])
            losses["text"] = F.cross_entropy(logits, rows.labels[:, 1:][places])
        if len(rows.phrases):
            row, place, *kinds = rows.phrases.unbind(1)
            states = torch.cat([tap[row, place] for tap in taps["layers"]], dim=-1)
            losses["phrase"] = _classify(self.phrase_head(self.tap_norm(states)), kinds, PHRASE_CLASSES)
        if rows.pixels is not None:
            images = rows.ids == self.vlm.config.image_token_id
            states = torch.cat([tap[images] for tap in taps["layers"]], dim=-1)
            losses["pixel"] = pixel_loss(self.pixel_head(self.tap_norm(states)), rows.pixels)
            if (rows.attributes >= 0).all(-1).any():
                looked = self.look_head(taps["projector"].flatten(0, 1))
                losses["look"] = _classify(looked, rows.attributes.flatten(0, 1).unbind(1), LOOK_CLASSES)
        return losses


def _classify(logits: Tensor, kinds: Iterable[Tensor], classes: Sequence[int]) -> Tensor:
    parts = logits.split(list(classes), dim=-1)
    return sum(F.cross_entropy(part, kind, ignore_index=-1) for part, kind in zip(parts, kinds, strict=True))


def pixel_loss(predicted: Tensor, pixels: Tensor) -> Tensor:
    """Mean squared error of 16 x 16 px per token; what differs from the tile's commonest colour weighs five times."""
    side = TILE // 4
    truth = F.pixel_unshuffle(pixels, side).flatten(2).mT.flatten(0, 1)
    ground = pixels.flatten(2).median(-1).values[:, :, None, None]
    differs = ((pixels - ground).abs().amax(1, keepdim=True) > 0.05).float()
    weight = 1 + 4 * F.pixel_unshuffle(differs, side).flatten(2).mT.flatten(0, 1).repeat(1, 3)
    return (weight * (predicted - truth).square()).mean()


@contextmanager
def tapped(vlm: InternVLForConditionalGeneration, taps_at: Sequence[int] = TAPS) -> Iterator[dict]:
    """Collects what the tapped layers (1 to their number) and the projector put out during a training forward."""
    taps: dict = {"layers": [], "projector": None}
    layers = vlm.get_decoder().layers
    handles = [
        layers[i - 1].register_forward_hook(
            lambda _, __, out: taps["layers"].append(out[0] if isinstance(out, tuple) else out)
        )
        for i in taps_at
    ]
    handles.append(vlm.model.multi_modal_projector.register_forward_hook(lambda _, __, out: taps.update(projector=out)))
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()


WEIGHTS = {"text": 1.0, "phrase": 0.15, "pixel": 1.0, "look": 0.1}


def loss(model: nn.Module, parts: list[Rows]) -> tuple[Tensor, dict[str, Tensor]]:
    losses = model(parts)
    return sum(WEIGHTS[key] * value for key, value in losses.items()), {k: v.detach() for k, v in losses.items()}


def batch(step: int, seed: int, collate: Collator, size: int, shard: tuple[int, int] = (0, 1)) -> list[Rows]:
    """One step's rows, sorted by length into three padded parts; `shard` = (process, processes) takes its share."""
    rng = Random(f"vlm-{seed}-{step}")
    images = round(size * IMAGE_SHARE)
    rows = text_rows(rng, size - images) + image_rows(rng, images) + looking_rows(rng, tiled=step % 3 == 0)
    rows = sorted(rows, key=collate.length)[shard[0] :: shard[1]]
    bounds = [round(i * len(rows) / 3) for i in range(4)]
    return [collate(rows[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]


def train(folder: Path, *, loop: LoopSpec = LOOP, device: str | None = None) -> InternVLForConditionalGeneration:
    """Trains the micro VLM and saves it with its tokenizer under `folder/vlm`."""
    torch.manual_seed(loop.seed)
    tokenizer = build_tokenizer()
    collate = Collator(tokenizer)
    model = Trainee(build_model(tokenizer))
    fit(
        model,
        loss,
        lambda step, seed, shard: batch(step, seed, collate, loop.batch_size, shard),
        loop,
        folder,
        device=device,
    )
    return model.vlm


def save(vlm: InternVLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the folder that `load_vlm` opens, in fp16."""
    folder.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(vlm).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = {
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": 3,
        "size": {"height": TILE, "width": TILE},
    }
    for name, content in (("preprocessor_config", processor), ("verifi", {"system_prompt": SYSTEM_PROMPT})):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
