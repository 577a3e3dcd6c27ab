"""Recipes `micro-stage1` and `micro-stage2`: LAP, refiner and DiT on the frozen micro VLM and VAE.

Stage 1 is text-to-image, reconstruction and joint samples, as in the paper's Sec. 2 and 4; it never sees an edit.
Stage 2 goes on from it with edits of one reference (Sec. 4); it never sees two references.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerFast

from ..conditioning.pooling import build_pooling
from ..conditioning.refiner import Refiner
from ..conditioning.vlm.tiling import split, token_positions
from ..diffusion import flow
from ..diffusion.dit import DiT
from ..diffusion.vae import VAE
from ..fusion import pool, refine
from ..microworld.caption import caption
from ..microworld.edits import sample_edit
from ..microworld.phrases import CAPTION_PATTERNS
from ..microworld.prompts import sample_prompt
from ..microworld.render import render, render_array
from ..microworld.scene import Scene, sample_scene
from ..presets import ModelSpec, micro
from .loop import LoopSpec, fit
from .micro_vlm import TEXT_MIX, TILE, TOKENS, Collator, Row, normalize, tapped

SPEC = micro()
STAGE1 = LoopSpec(
    steps=3400,
    batch_size=26,
    rate=1.5e-3,
    muon_rate=4e-3,
    warmup=100,
    decay_fraction=0.5,
    ema_decay=0.999,
    save_minutes=4,
)
STAGE2 = replace(STAGE1, steps=780, rate=1e-3, muon_rate=2.5e-3, decay_fraction=0.8)
NOISES = 3  # noise levels per condition: the VLM, the VAE and the fusion head are then a small part of a step
OBJECT_WEIGHT = 2.5  # of a cell with a thing in it, against 1 for an empty one
EMPTY_SHARE = 0.1  # of the samples that carry text, for classifier-free guidance

GRIDS = (None, (3, 3), (2, 2), (3, 3), (1, 1), (3, 3))  # of tiles, in turn; nine are learned last
TILED, TILED_NOISES = 5, 2  # tiled pictures a step, and noise levels of each
SMALL_SHARE = 0.3  # of the tiled pictures are 64 px, so that tiles are seen at every scale

Keep = Literal["image", "rewrite", "both", "prompt"]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One training pair: what the VLM reads, which of its tokens condition the DiT, and the scene to draw."""

    row: Row
    keep: Keep
    target: Scene
    grid: tuple[int, int] = (1, 1)  # of tiles
    thumbnail: bool = True  # whether a tiled picture's thumbnail is kept


@dataclass(frozen=True)
class Group:
    """Samples of one kind and canvas, which run as one batch."""

    samples: tuple[Sample, ...]
    noises: int
    seed: int


class Generator(nn.Module):
    """The trained half: LAP or a rival, refiner and DiT."""

    def __init__(self, spec: ModelSpec = SPEC) -> None:
        super().__init__()
        self.spec = spec
        self.lap = build_pooling(spec.lap)
        self.refiner = Refiner(spec.refiner)
        self.dit = DiT(spec.dit)

    def init_weights(self) -> None:
        for part in (self.lap, self.refiner, self.dit):
            part.init_weights()

    def fuse(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """States [B, T, L, E] → what enters the DiT."""
        pooled = pool(self.spec, self.lap, self.refiner, states, mask)
        return refine(self.spec, self.refiner, pooled, mask)


class Trainee(nn.Module):
    """The generator beside its frozen VLM and VAE, which are no parameters of it."""

    def __init__(self, generator: Generator, frozen: Frozen) -> None:
        super().__init__()
        self.generator = generator
        self._frozen = [frozen]

    def forward(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        losses, weights = {}, {}
        for group in groups:
            first = group.samples[0]
            name = f"{first.keep}{'' if first.target.rows == 2 else '_large'}"
            name += f"_{len(first.row.tiles) - 1}" * (first.grid != (1, 1))
            losses[name] = self.loss(group)
            weights[name] = len(group.samples) * group.noises
        total = sum(weights.values())
        return {
            "loss": sum(losses[k] * weights[k] / total for k in losses),
            **{k: v.detach() for k, v in losses.items()},
        }

    def loss(self, group: Group) -> Tensor:
        frozen = self._frozen[0].to(next(self.generator.parameters()).device)
        states, mask, positions = frozen.states(group.samples)
        latents, weight = frozen.latents(group.samples)
        tokens = self.generator.fuse(states, mask)
        repeat = group.noises
        if repeat > 1:
            tokens, latents, weight, positions = (
                x.repeat_interleave(repeat, 0) for x in (tokens, latents, weight, positions)
            )
            mask = None if mask is None else mask.repeat_interleave(repeat, 0)
        generator = torch.Generator().manual_seed(group.seed)
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        t = flow.sample_times(len(latents), generator=generator).to(latents.device)
        predicted = self.generator.dit(flow.x_t(latents, noise, t), t, tokens, mask, positions)
        return flow.loss(predicted, latents, noise, weight)


class Frozen:
    """The micro VLM and VAE as teachers: samples → tapped states, target latents and loss weights."""

    def __init__(
        self,
        vlm: InternVLForConditionalGeneration,
        tokenizer: PreTrainedTokenizerFast,
        vae: VAE,
        layers: Sequence[int] = SPEC.layers,
    ) -> None:
        self.layers = tuple(layers)
        self.vlm, self.vae = vlm.eval().requires_grad_(False), vae.eval().requires_grad_(False)
        self.collate = Collator(tokenizer)

    def to(self, device: torch.device) -> Frozen:
        if self.vlm.device != device:
            self.vlm.to(device)
            self.vae.to(device)
        return self

    @torch.no_grad()
    def states(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor | None, Tensor]:
        """Tapped states [B, T, L, E] of the kept tokens, their mask (None = all real) and positions [B, T, 3]."""
        sequences, kept, places = zip(*(self._sequence(sample) for sample in samples), strict=True)
        longest = max(map(len, sequences))
        device = self.vlm.device
        ids = torch.tensor([s + [0] * (longest - len(s)) for s in sequences], device=device)
        tiles = [tile for sample in samples for tile in sample.row.tiles]
        extra = {"pixel_values": normalize(np.stack(tiles)).to(device)} if tiles else {}
        with tapped(self.vlm, self.layers) as taps:
            self.vlm.model(input_ids=ids, use_cache=False, **extra)
        states = torch.stack(taps["layers"], dim=2)
        length = max(map(len, kept))
        index = torch.tensor([k + [0] * (length - len(k)) for k in kept])
        mask = torch.arange(length) < torch.tensor([len(k) for k in kept])[:, None]
        positions = torch.zeros(len(kept), length, 3)
        for i, place in enumerate(places):
            positions[i, : len(place)] = torch.from_numpy(place)
        states = states[torch.arange(len(kept))[:, None], index]
        return states, None if mask.all() else mask.to(device), positions.to(device)

    def _sequence(self, sample: Sample) -> tuple[list[int], list[int], np.ndarray]:
        row, collate = sample.row, self.collate
        head, prompt = collate.head + collate.images(row), collate.encode(row.prompt)
        ids = head + prompt + collate.middle
        if sample.keep == "prompt" and prompt:  # no rewriting: the user's own words condition the picture
            return ids, list(range(len(head), len(head) + len(prompt))), np.zeros((len(prompt), 3), np.float32)
        written = collate.encode(caption(row.target)) if row.target is not None else []
        if sample.keep != "image" and not written:
            written = [collate.end]  # the empty condition: a rewrite that is nothing but its end
        image = self.vlm.config.image_token_id
        kept = [i for i, token in enumerate(head) if token == image] if sample.keep in ("image", "both") else []
        spots = token_positions(sample.grid, 4) if kept else np.zeros((0, 3), np.float32)
        if not sample.thumbnail:
            kept, spots = kept[:-TOKENS], spots[:-TOKENS]
        places = np.zeros((len(kept) + (len(written) if sample.keep != "image" else 0), 3), np.float32)
        places[: len(kept)] = spots
        if sample.keep != "image":
            kept += range(len(ids), len(ids) + len(written))
        return ids + written, kept, places

    @torch.no_grad()
    def latents(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """Target latents [B, C, h, w] and weights [B, 1, h, w] of mean about one."""
        images = np.stack([render_array(sample.target) for sample in samples])
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        latents = self.vae.encode(pixels.to(self.vlm.device))
        scale = 32 // self.vae.spec.compression
        weight = torch.ones(len(samples), 1, *latents.shape[2:])
        for i, sample in enumerate(samples):
            for t in sample.target.things:
                area = weight[i, 0, t.row * scale : (t.row + 1) * scale, t.column * scale : (t.column + 1) * scale]
                area.fill_(OBJECT_WEIGHT)
        return latents, weight.to(latents.device) / (0.5 + 0.5 * OBJECT_WEIGHT)


def text_sample(rng: Random, rows: int = 2, columns: int = 2) -> Sample:
    """A rewrite that follows a prompt of any kind; or, rarely, nothing at all."""
    if rng.random() < EMPTY_SHARE:
        return Sample(row=Row(), keep="rewrite", target=sample_scene(rng, rows=rows, columns=columns))
    if rng.random() < 0.5 or (rows, columns) != (2, 2):
        count = rng.choice((1, 2, 3, 4)) if (rows, columns) != (2, 2) else rng.choices((1, 2, 3, 4), (3, 4, 4, 1))[0]
        scene = sample_scene(rng, rows=rows, columns=columns, count=count)
        return Sample(row=Row(prompt=caption(scene), target=scene), keep="rewrite", target=scene)
    prompt = sample_prompt(rng, rng.choices(tuple(TEXT_MIX), tuple(TEXT_MIX.values()))[0])
    return Sample(row=Row(prompt=prompt.text, target=prompt.scene), keep="rewrite", target=prompt.scene)


def picture_sample(rng: Random, keep: Keep) -> Sample:
    """A picture to be drawn again: from its tokens, from the VLM's description of it, or from both."""
    scene = sample_scene(rng, count=rng.choices((1, 2, 3, 4), (3, 4, 4, 1))[0])
    if keep == "image":
        return Sample(row=Row(tiles=(render_array(scene),)), keep=keep, target=scene)
    prompt = rng.choice(CAPTION_PATTERNS["train"])
    return Sample(row=Row(tiles=(render_array(scene),), prompt=prompt, target=scene), keep=keep, target=scene)


def tiled_sample(rng: Random, grid: tuple[int, int], cells: int = 4) -> Sample:
    """A picture of cells x cells to be drawn again from its tiles."""
    count = rng.randint(3, 10) if cells == 4 else rng.randint(1, 4)
    scene = sample_scene(rng, rows=cells, columns=cells, count=count)
    tiles = tuple(np.asarray(tile) for tile in split(render(scene), grid, TILE))
    # A thumbnail is easier to draw from than nine tiles; half of them go without, or the tiles would be left alone.
    thumbnail = grid != (3, 3) or rng.random() < 0.5
    row = Row(tiles=tiles, per_image=(len(tiles),))
    return Sample(row=row, keep="image", target=scene, grid=grid, thumbnail=thumbnail)


def edit_sample(rng: Random) -> Sample:
    edit = sample_edit(rng)
    row = Row(tiles=(render_array(edit.source),), prompt=edit.instruction, target=edit.target)
    return Sample(row=row, keep="both", target=edit.target)


def side_group(rng: Random, grid: tuple[int, int] | None, shard: tuple[int, int]) -> Group:
    """Other canvases: pictures in this grid of tiles, or (None) text on a wide or tall canvas."""
    if grid is None:
        rows, columns = rng.choice(((2, 3), (3, 2)))
        samples, noises = [text_sample(rng, rows, columns) for _ in range(6)], 1
    else:
        cells = 2 if grid != (1, 1) and rng.random() < SMALL_SHARE else 4
        samples, noises = [tiled_sample(rng, grid, cells) for _ in range(TILED)], TILED_NOISES
    return Group(tuple(samples[shard[0] :: shard[1]]), noises, rng.getrandbits(32) + shard[0])


def stage1_batch(step: int, seed: int, size: int, shard: tuple[int, int] = (0, 1)) -> list[Group]:
    """16 texts, 2 descriptions of unseen pictures, 5 pictures and 3 joint samples in 26, and a side group."""
    rng = Random(f"stage1-{seed}-{step}")
    texts = [text_sample(rng) for _ in range(size * 16 // 26)]
    texts += [picture_sample(rng, "rewrite") for _ in range(size * 2 // 26)]
    pictures = [picture_sample(rng, "image") for _ in range(size * 5 // 26)]
    joint = [picture_sample(rng, "both") for _ in range(size * 3 // 26)]
    grid = GRIDS[step % len(GRIDS)]
    return [*(_group(rng, samples, shard) for samples in (texts, pictures, joint)), side_group(rng, grid, shard)]


def stage2_batch(step: int, seed: int, size: int, shard: tuple[int, int] = (0, 1)) -> list[Group]:
    """12 edits and 2 joint samples, 9 texts and 3 pictures in 26, and a side group."""
    rng = Random(f"stage2-{seed}-{step}")
    joint = [edit_sample(rng) for _ in range(size * 12 // 26)]
    joint += [picture_sample(rng, "both") for _ in range(size * 2 // 26)]
    texts = [text_sample(rng) for _ in range(size * 8 // 26)] + [picture_sample(rng, "rewrite")]
    pictures = [picture_sample(rng, "image") for _ in range(size * 3 // 26)]
    grid = GRIDS[step % len(GRIDS)]
    return [*(_group(rng, samples, shard) for samples in (joint, texts, pictures)), side_group(rng, grid, shard)]


def _group(rng: Random, samples: list[Sample], shard: tuple[int, int]) -> Group:
    return Group(tuple(samples[shard[0] :: shard[1]]), NOISES, rng.getrandbits(32) + shard[0])


def loss(model: nn.Module, groups: list[Group]) -> tuple[Tensor, dict[str, Tensor]]:
    losses = model(groups)
    return losses.pop("loss"), losses


def train(
    folder: Path,
    frozen: Frozen,
    generator: Generator,
    batch: Callable[[int, int, int, tuple[int, int]], list[Group]],
    loop: LoopSpec,
    *,
    device: str | None = None,
) -> Generator:
    """Trains the generator in place, by `stage1_batch` or `stage2_batch`."""
    if loop.compile:
        torch._dynamo.config.recompile_limit = 32  # with and without mask, with one sample or many
        for block in (*generator.lap.blocks, *generator.refiner.blocks, *generator.dit.blocks):
            block.compile(dynamic=True)
    fit(
        Trainee(generator, frozen),
        loss,
        lambda step, seed, shard: batch(step, seed, loop.batch_size, shard),
        loop,
        folder,
        device=device,
    )
    return generator
