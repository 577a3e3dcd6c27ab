"""The frozen parts that all arms share: the embedded micro VLM and VAE, and the T5 that a run trains for itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from shutil import rmtree

import torch
from torch import Tensor

from ..conditioning.vlm import FrozenVLM, load_vlm
from ..conditioning.vlm.t5 import T5TextEncoder, load_t5
from ..diffusion.vae import VAE
from ..pipeline import WEIGHTS, load_vae
from ..presets import micro
from ..training import micro_t5
from ..training.loop import LoopSpec
from ..training.micro_dit import Frozen, Sample

EVERY_THIRD = micro().layers


@cache
def vlm() -> FrozenVLM:
    return load_vlm(WEIGHTS / "micro" / "vlm", layers=EVERY_THIRD, dtype=torch.float32)


@cache
def vae() -> VAE:
    return load_vae(WEIGHTS / "micro" / "vae.safetensors")


class TextTeacher(Frozen):
    """A T5 in the place of the VLM: samples → its states of their prompts."""

    def __init__(self, encoder: T5TextEncoder, vae: VAE) -> None:
        self.encoder, self.layers = encoder, encoder.layers
        self.vlm, self.vae = encoder.model, vae.eval().requires_grad_(False)

    @torch.no_grad()
    def states(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor | None, Tensor]:
        """States [B, T, 1, E] of the prompts' tokens, their mask (None = all real) and positions [B, T, 3], all zero.

        Raises:
            ValueError: a sample with a picture or a rewrite, of which T5 knows nothing.
        """
        if odd := [s for s in samples if s.row.tiles or (s.keep != "prompt" and (s.row.prompt or s.row.target))]:
            raise ValueError(f"a sample that keeps {odd[0].keep!r}: T5 is trained on the words of prompts alone")
        states, mask = self.encoder.states([self.encoder.ids(sample.row.prompt) for sample in samples])
        return states[:, :, None], None if mask.all() else mask, torch.zeros(*mask.shape, 3, device=mask.device)


def text_loop(share: float = 1.0) -> LoopSpec:
    """The recipe of the T5 for a run of this share of the usual length."""
    return replace(micro_t5.LOOP, steps=max(1, round(micro_t5.LOOP.steps * share)))


def text_folder(folder: Path, loop: LoopSpec) -> Path:
    """Where a run keeps its T5; the name changes with everything that decides its weights."""
    return folder / f"t5-{sha256(repr((loop, micro_t5.MASKED, micro_t5.BLANK_SHARE)).encode()).hexdigest()[:8]}"


def train_text_encoder(folder: Path, loop: LoopSpec, report: Callable[[int, int], None] | None = None) -> Path:
    """Trains the T5 unless it is there; goes on where it was cut off."""
    path, run = text_folder(folder, loop), folder / "runs" / text_folder(folder, loop).name
    if not (path / "config.json").is_file():
        t5 = micro_t5.train(run, loop=loop, device="cpu", report=report)
        fresh = path.with_name(f".{path.name}")
        micro_t5.save(t5, fresh)
        fresh.rename(path)
        rmtree(run)
    return path


@cache
def text_encoder(path: Path) -> T5TextEncoder:
    return load_t5(path, dtype=torch.float32)


@cache
def untrained_text_encoder() -> T5TextEncoder:
    """Of the same sizes, to count its work by."""
    tokenizer = micro_t5.build_tokenizer()
    return T5TextEncoder(micro_t5.encoder_of(micro_t5.build_model(tokenizer)), tokenizer)
