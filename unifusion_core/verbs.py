"""What each verb of the command line does: parsed arguments in, a JSON-able report out."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

    from .conditioning.vlm import FrozenVLM
    from .pipeline import UniFusion

LONGEST_EDIT_SIDE = 1024  # px; a photo edited without --size is shrunk to it
RECIPES = {
    "micro-vlm": "the tiny InternVL",
    "micro-vae": "the VAE",
    "micro-stage1": "LAP, refiner and DiT on text and pictures; needs the two above in --out",
    "micro-stage2": "goes on from stage 1 with edits",
}

Report = dict[str, Any]


def demo(args: argparse.Namespace) -> Report:
    from .demo import run

    with _progress(args) as progress:
        report = run(_loader(args), args.out, seed=args.seed, progress=progress)
    for picture in report["pictures"]:
        print(f"{picture['seconds']:6.2f} s  {args.out / picture['file']}  {picture['prompt']}")
    print(f"{report['seconds']:6.2f} s  in all; see {args.out / report['contact_sheet']}")
    return report


def generate(args: argparse.Namespace) -> Report:
    from .conditioning.vlm import Request, load_image
    from .diffusion.schedule import parse_schedule, silent_segments
    from .files import save_png
    from .pipeline import TRACKS

    start = time.perf_counter()
    if args.out.suffix.lower() != ".png":
        raise ValueError(f"--out {args.out}: pictures are written as .png, which keeps how they were made")
    check_target(args.out)
    if args.edit and not args.image:
        raise ValueError("--edit changes a picture; give it with --image FILE")
    images = [load_image(path) for path in args.image]
    model = _loader(args)()
    size = args.size or (_size_of(images[0], model.multiple) if args.edit else model.spec.size)
    if args.edit and not args.size and size != images[0].size:
        _note(args, f"the source is {_px(images[0].size)} px, the picture will be {_px(size)}; --size chooses another")
    tracks = [track for track, kinds in TRACKS.items() if images or "image" not in kinds]
    schedule = f"{'all' if images else 'text'}:0-1" if args.schedule is None else args.schedule
    sampling = {"steps": args.steps, "guidance": args.guidance, "size": size, "sampler": args.sampler}
    plan = model.plan(tracks, schedule=schedule, **sampling)
    steps = len(plan.timesteps) - 1
    for segment in silent_segments(parse_schedule(schedule), steps, plan.timesteps):
        _warn(f"segment '{segment}' of the schedule covers none of the {steps} steps")

    request = Request(args.prompt, tuple(images), max_tiles=args.max_tiles)
    if args.rewrite:
        with _bar(args, args.max_new_tokens, "rewriting") as bar:
            conditions = model.prepare([request], on_token=lambda *_: bar.update(), **_rewriting(args))
    else:
        conditions = model.prepare([request], rewriting=False)
    _warn_of_unknown_words(model.vlm, args.prompt)

    with _bar(args, steps, "sampling") as bar:
        latents = model.sample(
            conditions,
            schedule=schedule,
            seed=args.seed,
            count=args.count,
            callback=lambda *_: bar.update(),
            **sampling,
        )
    record = {
        "prompt": args.prompt,
        "images": [str(path) for path in args.image],
        "max_tiles": args.max_tiles,
        "rewrite": _rewrite_report(conditions.rewrites.results[0]) if conditions.rewrites else None,
        "schedule": schedule,
        "steps": steps,
        "guidance": plan.guidance,
        "sampler": args.sampler,
        "size": list(size),
        "model": {"name": args.model, "spec": model.spec.name, "vlm": model.vlm.identity},
    }
    if conditions.rewrites:
        print(conditions.texts[0])
    pictures = []
    for number, image in enumerate(model.decode(latents)):
        path = args.out if args.count == 1 else args.out.with_stem(f"{args.out.stem}-{number + 1}")
        seed = (args.seed + number) % 2**64
        save_png(path, image, {**record, "seed": seed})
        print(f"{path}  {_px(size)} px, seed {seed}")
        pictures.append({"file": str(path), "seed": seed})
    return {**record, "seed": args.seed, "pictures": pictures, "seconds": time.perf_counter() - start}


def rewrite(args: argparse.Namespace) -> Report:
    from .conditioning.vlm import Request, load_image

    start = time.perf_counter()
    images = tuple(map(load_image, args.image))
    model = _loader(args)()
    request = Request(args.prompt, images, max_tiles=args.max_tiles)
    stream = _Stream()
    with _bar(args, args.max_new_tokens, "rewriting", shown=not sys.stdout.isatty()) as bar:

        def on_token(row: int, token: int, text: str) -> None:
            bar.update()
            if sys.stdout.isatty():
                stream.show(text)

        result = model.rewrite([request], on_token=on_token, **_rewriting(args)).results[0]
    stream.show(result.text)
    print()
    _warn_of_unknown_words(model.vlm, args.prompt)
    return {
        "prompt": args.prompt,
        "images": [str(path) for path in args.image],
        **_rewrite_report(result),
        "seconds": time.perf_counter() - start,
    }


def evaluate_micro(args: argparse.Namespace) -> Report:
    from .evaluation import micro, report

    with _progress(args) as progress:
        scores = micro.evaluate(
            _loader(args),
            split=args.split,
            num=args.n,
            seeds=args.seeds or (args.seed, args.seed + 1),
            progress=progress,
        )
    print(report.table(scores))
    return scores


def evaluate_reconstruction(args: argparse.Namespace) -> Report:
    from .evaluation import reconstruction, report

    with _progress(args) as progress:
        scores = reconstruction.evaluate(
            _loader(args), tiles=args.tiles, cells=args.cells, num=args.n, seed=args.seed, progress=progress
        )
    print(report.table(scores))
    return scores


def bench(args: argparse.Namespace) -> Report:
    from .evaluation import bench, bench_comfy

    with _progress(args) as progress:
        if args.comfy:
            report = bench_comfy.run(progress=progress)
        else:
            report = bench.run(_loader(args)(), seed=args.seed, progress=progress)
    print(bench.table(report))
    return report


def train(args: argparse.Namespace) -> Report:
    if args.list:
        for name, what in RECIPES.items():
            print(f"{name:14}{what}")
        return {"recipes": RECIPES}
    if args.recipe is None or args.out is None:
        raise ValueError(f"train needs a recipe ({', '.join(RECIPES)}) and --out DIR; --list describes the recipes")
    _check_device(args.device)
    from .training import recipes

    start = time.perf_counter()
    settings = {"seed": args.seed, "device": args.device, "steps": args.steps, "compile": args.compile}
    written = recipes.run(args.recipe, args.out, **settings)
    seconds = time.perf_counter() - start
    print(f"{written}  {args.recipe}, {seconds:.0f} s")
    return {"recipe": args.recipe, "written": str(written), "seed": args.seed, "steps": args.steps, "seconds": seconds}


# What verbs share.


def _loader(args: argparse.Namespace) -> Callable[..., UniFusion]:
    """Returns load(name), which loads each model once; a --model of the user's stands in for the embedded ones."""
    from .pipeline import load_model

    _check_device(args.device)

    @cache
    def load(name: str) -> UniFusion:
        return load_model(name, device=args.device)

    return lambda name="micro": load(name if args.model == "micro" else args.model)


def _check_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this PyTorch sees no CUDA device; leave --device out to use the CPU")


def check_target(path: Path) -> None:
    """Raises ValueError, before any work is done, where a file could not be put."""
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; give the name of a file")
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    if not existing.is_dir():
        raise ValueError(f"{path}: {existing} is a file, not a folder")


def _size_of(image: Image.Image, multiple: int) -> tuple[int, int]:
    """The size of a source picture, shrunk to LONGEST_EDIT_SIDE and rounded to what the model can draw."""
    scale = min(1, LONGEST_EDIT_SIDE / max(image.size))
    width, height = (max(multiple, math.floor(side * scale / multiple + 0.5) * multiple) for side in image.size)
    return width, height


def _rewriting(args: argparse.Namespace) -> Report:
    return {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "seed": args.seed}


def _rewrite_report(result) -> Report:
    """A `Rewrite` as JSON."""
    return {
        "text": result.text,
        "token_ids": list(result.token_ids),
        "ended": result.ended,
        "settings": asdict(result.settings),
    }


def _warn_of_unknown_words(vlm: FrozenVLM, prompt: str) -> None:
    """Names the words that the tokenizer reads as its unknown token, whose meaning is thereby lost."""
    unknown = vlm.tokenizer.unk_token_id
    if unknown is None:
        return
    tokens = vlm.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
    pairs = zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
    words = list(dict.fromkeys(prompt[start:stop] for token, (start, stop) in pairs if token == unknown))
    if words:
        more = f" and {len(words) - 8} more" if len(words) > 8 else ""
        _warn(f"words that this model does not know: {', '.join(words[:8])}{more}")


def _warn(text: str) -> None:
    print(f"unifusion: warning: {text}", file=sys.stderr)


def _note(args: argparse.Namespace, text: str) -> None:
    if not args.quiet:
        print(f"unifusion: note: {text}", file=sys.stderr)


@contextmanager
def _bar(args: argparse.Namespace, total: int | None, what: str, shown: bool = True) -> Iterator:
    """A progress bar that leaves no trace; drawn on a terminal only."""
    from tqdm import tqdm

    with tqdm(total=total, desc=what, leave=False, disable=None if shown and not args.quiet else True) as bar:
        yield bar


@contextmanager
def _progress(args: argparse.Namespace) -> Iterator[Callable[[str, int, int], None]]:
    """A bar as progress(part, done, total)."""
    with _bar(args, None, "") as bar:

        def progress(part: str, done: int, total: int) -> None:
            bar.total = total
            bar.set_description(part, refresh=False)
            bar.n = done
            bar.refresh()

        yield progress


class _Stream:
    """Prints a growing text as it grows."""

    def __init__(self) -> None:
        self.shown = ""

    def show(self, text: str) -> None:
        text = text.strip()
        if text.startswith(self.shown) and not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character
            print(text[len(self.shown) :], end="", flush=True)
            self.shown = text


def _px(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


# The parser.
