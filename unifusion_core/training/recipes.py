"""Recipes by name: each trains one part in one seeded, resumable pass and saves it where the next one finds it.

`micro-vae`, `micro-vlm` and `micro-t5` stand alone; `micro-stage1` needs the first two in the same folder,
`micro-stage2` needs stage 1.
A finished folder is what `load_model` opens: `vlm/`, `vae.safetensors`, `base.safetensors`, `edit.safetensors`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import torch
from accelerate import PartialState

from ..conditioning.vlm import load_vlm
from ..diffusion.vae import preview_colors
from ..pipeline import load_generator, save_generator
from ..vaes import load_vae, save_vae
from . import micro_dit, micro_t5, micro_vae, micro_vlm
from .loop import LoopSpec


def run(
    name: str, out: Path, *, seed: int = 0, device: str | None = None, steps: int | None = None, compile: bool = False
) -> Path:
    """Trains one recipe into `out`; run it again to resume. Returns what was written.

    Args:
        steps: instead of the recipe's own number; the rate's fall is spread over it.
        compile: compile the transformer blocks, where the recipe has any (stages 1 and 2).
    Raises:
        ValueError: an unknown recipe, or what it builds on is not in `out` yet.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; there are {', '.join(RECIPES)}")
    train, loop = RECIPES[name]
    return train(Path(out), replace(loop, seed=seed, steps=steps or loop.steps, compile=compile), device)


def _vae(out: Path, loop: LoopSpec, device: str | None) -> Path:
    vae = micro_vae.train(out / "runs" / "micro-vae", loop=loop, device=device)
    micro_vae.sharpen(vae, out / "runs" / "micro-vae-decoder", loop=_like(micro_vae.DECODER, loop), device=device)
    if PartialState().is_main_process:
        save_vae(out / "vae.safetensors", vae, torch.float16)
    return out / "vae.safetensors"


def _vlm(out: Path, loop: LoopSpec, device: str | None) -> Path:
    vlm = micro_vlm.train(out / "runs" / "micro-vlm", loop=loop, device=device)
    if PartialState().is_main_process:
        micro_vlm.save(vlm, micro_vlm.build_tokenizer(), out / "vlm")
    return out / "vlm"


def _t5(out: Path, loop: LoopSpec, device: str | None) -> Path:
    t5 = micro_t5.train(out / "runs" / "micro-t5", loop=loop, device=device)
    if PartialState().is_main_process:
        micro_t5.save(t5, out / "t5")
    return out / "t5"


def _stage1(out: Path, loop: LoopSpec, device: str | None) -> Path:
    torch.manual_seed(loop.seed)
    generator = micro_dit.Generator()
    generator.init_weights()
    return _stage(out, "base", generator, micro_dit.stage1_batch, "micro-stage1", loop, device)


def _stage2(out: Path, loop: LoopSpec, device: str | None) -> Path:
    _needs(out / "base.safetensors", "micro-stage1")
    generator = micro_dit.Generator()
    _, parts = load_generator(out / "base.safetensors")
    for name, part in zip(("lap", "refiner", "dit"), parts, strict=True):
        getattr(generator, name).load_state_dict(part.state_dict())
    return _stage(out, "edit", generator, micro_dit.stage2_batch, "micro-stage2", loop, device)


def _stage(
    out: Path,
    weights: str,
    generator: micro_dit.Generator,
    batch: Callable,
    run_name: str,
    loop: LoopSpec,
    device: str | None,
) -> Path:
    _needs(out / "vlm", "micro-vlm")
    _needs(out / "vae.safetensors", "micro-vae")
    vlm = load_vlm(out / "vlm", layers=micro_dit.SPEC.layers, dtype=torch.float32)
    vae = load_vae(out / "vae.safetensors")
    frozen = micro_dit.Frozen(vlm.model, vlm.tokenizer, vae)
    micro_dit.train(out / "runs" / run_name, frozen, generator, batch, loop, device=device)
    if PartialState().is_main_process:
        colors = preview_colors(vae.cpu(), micro_vae.pictures(Random(0), 64))
        spec = replace(micro_dit.SPEC, vlm=vlm.identity, preview=colors)
        save_generator(out / f"{weights}.safetensors", spec, generator, torch.float16)
    return out / f"{weights}.safetensors"


def _like(loop: LoopSpec, first: LoopSpec) -> LoopSpec:
    """A second phase under the seed of the first, shortened in proportion where that was."""
    steps = max(1, loop.steps * first.steps // micro_vae.LOOP.steps)
    return replace(loop, seed=first.seed, steps=steps)


def _needs(path: Path, recipe: str) -> None:
    if not path.exists():
        raise ValueError(f"{path} is missing: run `unifusion train {recipe} --out {path.parent}` first")


RECIPES: dict[str, tuple[Callable[[Path, LoopSpec, str | None], Path], LoopSpec]] = {
    "micro-vae": (_vae, micro_vae.LOOP),
    "micro-vlm": (_vlm, micro_vlm.LOOP),
    "micro-t5": (_t5, micro_t5.LOOP),
    "micro-stage1": (_stage1, micro_dit.STAGE1),
    "micro-stage2": (_stage2, micro_dit.STAGE2),
}
