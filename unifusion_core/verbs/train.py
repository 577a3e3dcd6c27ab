"""The verb train: recipes of the micro model, and models of any size on one's own pictures."""

from __future__ import annotations

import time
from dataclasses import fields, replace
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


LARGE = {
    "generator": "LAP, refiner and DiT of a preset, or of a model file, on your own pictures",
    "adapter": "LAP before the frozen DiT of Z-Image, FLUX.2 Klein or Boogu-Image, on your own pictures",
}


OWN_DATA = {  # of those: the option → its field of `training.generator.Run`, `training.adapting.Run`, or of the loop
    "run": {
        "profile": "profile", "host": "host",
        "preset": "preset", "init": "init", "conditioning": "conditioning", "refiner": "refiner", "layers": "layers",
        "stage": "stage", "accumulation": "accumulation", "side": "size",
        "tiles": "tiles", "dropout": "dropout", "most_damaged": "most_damaged", "fsdp": "fsdp",
        "checkpointing": "checkpointing", "precision": "precision", "save_every": "save_every", "cache": "cache",
        "cache_states": "cache_states",
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
        return _train_large(args)
    if odd := [name for name in given if name != "steps"]:
        raise ValueError(f"{_option(odd[0])} does not belong to `train {args.recipe}`, but to {' or '.join(LARGE)}")
    from ..training import recipes

    start = time.perf_counter()
    settings = {"seed": args.seed, "device": args.device, "steps": args.steps, "compile": args.compile}
    written = recipes.run(args.recipe, args.out, **settings)
    seconds = time.perf_counter() - start
    print(f"{written}  {args.recipe}, {seconds:.0f} s")
    return {"recipe": args.recipe, "written": str(written), "seed": args.seed, "steps": args.steps, "seconds": seconds}


def _train_large(args: argparse.Namespace) -> Report:
    needed = {"generator": ("vlm", "vae", "data"), "adapter": ("profile", "host", "data")}[args.recipe]
    if missing := [name for name in needed if not getattr(args, name)]:
        raise ValueError(f"train {args.recipe} needs --{' and --'.join(missing)}")
    from ..training import adapting, asked, generator

    training = {"generator": generator, "adapter": adapting}[args.recipe]
    start = time.perf_counter()
    known = {field.name for field in fields(training.Run)}
    given = {
        kind: {name: value for name in names if (value := getattr(args, name)) is not None}
        for kind, names in OWN_DATA.items()
    }
    if odd := [name for name in given["run"] if OWN_DATA["run"][name] not in known]:
        raise ValueError(f"{_option(odd[0])} does not belong to `train {args.recipe}`")
    run, loop = ({OWN_DATA[kind][name]: value for name, value in given[kind].items()} for kind in ("run", "loop"))
    if args.ema is not None:
        loop["ema_decay"] = args.ema or None
    if args.mix is not None:
        run["mix"] = dict(zip(asked.STAGE1_MIX, args.mix, strict=True))
    run = training.Run(
        out=args.out,
        vlm=args.vlm,
        vae=args.vae,
        data=tuple(args.data),
        loop=replace(training.Run.loop, seed=args.seed, compile=args.compile, **loop),
        device=args.device,
        quiet=args.quiet,
        **run,
    )
    written = training.train(run)
    seconds = time.perf_counter() - start
    what = f"before {run.profile}" if args.recipe == "adapter" else f"stage {run.stage}"
    print(f"{written}  {what}, {run.loop.steps} steps, {seconds:.0f} s")
    return {"recipe": args.recipe, "written": str(written), "settings": run.settings(), "seconds": seconds}


def _option(name: str) -> str:
    return f"--{name.replace('_', '-').replace('side', 'size')}"


def _plan(args: argparse.Namespace) -> Report:
    from ..presets import PRESETS
    from ..training import plan
    from ..training.plan_adapter import HOSTS, plan_adapter

    if args.plan not in (*PRESETS, *HOSTS):
        known = f"{', '.join(PRESETS)}, or for an adapter {', '.join(HOSTS)}"
        raise ValueError(f"--plan {args.plan!r}: expected one of {known}")
    report = plan.plan(PRESETS[args.plan](), args.gpus) if args.plan in PRESETS else plan_adapter(args.plan, args.gpus)
    print(plan.table(report))
    return report
