"""The verb train: recipes of the micro model, and models of any size on one's own pictures."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from .common import Report, check_device

if TYPE_CHECKING:
    import argparse

RECIPES = {
    "micro-vlm": "the tiny InternVL",
    "micro-vae": "the VAE",
    "micro-t5": "a tiny T5, the baseline that reads text alone",
    "micro-stage1": "LAP, refiner and DiT on text and pictures; needs the two above in --out",
    "micro-stage2": "goes on from stage 1 with edits",
}


LARGE = {"generator": "LAP, refiner and DiT of a preset, or of a model file, on your own pictures"}


OWN_DATA = {  # of `train generator`: the option → its field of `training.generator.Run`, or of the loop
    "run": {
        "preset": "preset", "init": "init", "stage": "stage", "accumulation": "accumulation", "side": "size",
        "tiles": "tiles", "dropout": "dropout", "most_damaged": "most_damaged", "fsdp": "fsdp",
        "checkpointing": "checkpointing", "precision": "precision", "save_every": "save_every", "cache": "cache",
        "weights": "weights", "copy_vlm": "copy_vlm", "workers": "workers",
    },
    "loop": {"steps": "steps", "batch": "batch_size", "rate": "rate", "warmup": "warmup"},
}  # fmt: skip


def train(args: argparse.Namespace) -> Report:
    if args.list:
        for name, what in {**RECIPES, **LARGE}.items():
            print(f"{name:14}{what}")
        return {"recipes": {**RECIPES, **LARGE}}
    if args.plan is not None:
        return _plan(args)
    if args.recipe is None or args.out is None:
        names = ", ".join((*RECIPES, *LARGE))
        raise ValueError(f"train needs a recipe ({names}) and --out DIR; --list describes the recipes")
    check_device(args.device)
    given = [name for names in OWN_DATA.values() for name in names if getattr(args, name) is not None]
    given += [name for name in ("vlm", "vae", "data", "mix", "ema") if getattr(args, name) is not None]
    if args.recipe in LARGE:
        return _train_generator(args)
    if odd := [name for name in given if name != "steps"]:
        raise ValueError(f"--{odd[0].replace('_', '-').replace('side', 'size')} belongs to `train generator` only")
    from ..training import recipes

    start = time.perf_counter()
    settings = {"seed": args.seed, "device": args.device, "steps": args.steps, "compile": args.compile}
    written = recipes.run(args.recipe, args.out, **settings)
    seconds = time.perf_counter() - start
    print(f"{written}  {args.recipe}, {seconds:.0f} s")
    return {"recipe": args.recipe, "written": str(written), "seed": args.seed, "steps": args.steps, "seconds": seconds}


def _train_generator(args: argparse.Namespace) -> Report:
    if missing := [name for name in ("vlm", "vae", "data") if not getattr(args, name)]:
        raise ValueError(f"train generator needs --{' and --'.join(missing)}")
    from ..training import generator

    start = time.perf_counter()
    fields = {
        kind: {field: value for name, field in names.items() if (value := getattr(args, name)) is not None}
        for kind, names in OWN_DATA.items()
    }
    if args.ema is not None:
        fields["loop"]["ema_decay"] = args.ema or None
    if args.mix is not None:
        fields["run"]["mix"] = dict(zip(generator.STAGE1_MIX, args.mix, strict=True))
    loop = replace(generator.LOOP, seed=args.seed, compile=args.compile, **fields["loop"])
    run = generator.Run(
        out=args.out,
        vlm=args.vlm,
        vae=args.vae,
        data=tuple(args.data),
        loop=loop,
        device=args.device,
        quiet=args.quiet,
        **fields["run"],
    )
    written = generator.train(run)
    seconds = time.perf_counter() - start
    print(f"{written}  stage {run.stage}, {loop.steps} steps, {seconds:.0f} s")
    return {"recipe": args.recipe, "written": str(written), "settings": run.settings(), "seconds": seconds}


def _plan(args: argparse.Namespace) -> Report:
    from ..presets import PRESETS
    from ..training import plan

    if args.plan not in PRESETS:
        raise ValueError(f"--plan {args.plan!r}: expected one of {', '.join(PRESETS)}")
    report = plan.plan(PRESETS[args.plan](), args.gpus)
    print(plan.table(report))
    return report
