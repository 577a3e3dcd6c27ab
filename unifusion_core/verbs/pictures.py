"""The verbs that draw or write: demo, generate, rewrite."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import Report, check_device, check_target, counted_bar, loader, note, part_bar, some, warn

if TYPE_CHECKING:
    import argparse

    from PIL import Image

    from ..conditioning.vlm import FrozenVLM, Request
    from ..pipeline import Conditions, UniFusion

LONGEST_EDIT_SIDE = 1024  # px; a photo edited without --size is shrunk to it


def demo(args: argparse.Namespace) -> Report:
    from ..demo import run

    with part_bar(args) as progress:
        report = run(loader(args), args.out, seed=args.seed, progress=progress)
    for picture in report["pictures"]:
        print(f"{picture['seconds']:6.2f} s  {args.out / picture['file']}  {picture['prompt']}")
    print(f"{report['seconds']:6.2f} s  in all; see {args.out / report['contact_sheet']}")
    return report


def generate(args: argparse.Namespace) -> Report:
    from ..conditioning.vlm import Request, load_image
    from ..diffusion.schedule import parse_schedule, silent_segments
    from ..files import save_png
    from ..pipeline import tracks_of

    start = time.perf_counter()
    if args.out.suffix.lower() != ".png":
        raise ValueError(f"--out {args.out}: pictures are written as .png, which keeps how they were made")
    check_target(args.out)
    if args.edit and not args.image:
        raise ValueError("--edit changes a picture; give it with --image FILE")
    images = [load_image(path) for path in args.image]
    model = loader(args)()
    size = args.size or (_size_of(images[0], model.multiple) if args.edit else model.spec.size)
    if args.edit and not args.size and size != images[0].size:
        note(args, f"the source is {_px(images[0].size)} px, the picture will be {_px(size)}; --size chooses another")
    tracks = tracks_of(model.kinds(args.rewrite, args.keep), bool(images))
    schedule = f"{'all' if 'all' in tracks else next(iter(tracks))}:0-1" if args.schedule is None else args.schedule
    sampling = {"steps": args.steps, "guidance": args.guidance, "size": size, "sampler": args.sampler}
    plan = model.plan(tracks, schedule=schedule, **sampling)
    steps = len(plan.timesteps) - 1
    for segment in silent_segments(parse_schedule(schedule), steps, plan.timesteps):
        warn(f"segment '{segment}' of the schedule covers none of the {steps} steps")

    if untrained := _untrained(model, "image" in tracks):
        warn(untrained)
    request = Request(args.prompt, tuple(images), max_tiles=args.max_tiles, token_budget=args.token_budget)
    if args.replay:
        conditions = _replayed(args, model, request)
    elif args.rewrite:
        with counted_bar(args, args.max_new_tokens, "rewriting") as bar:
            conditions = model.prepare([request], keep=args.keep, on_token=lambda *_: bar.update(), **_rewriting(args))
    else:
        conditions = model.prepare([request], rewriting=False, keep=args.keep)
    _warn_of_unknown_words(model.vlm, args.prompt)

    with counted_bar(args, steps, "sampling") as bar:
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
        "rewrite": json.loads(conditions.rewrites.results[0].to_json()) if conditions.rewrites else None,
        "keep": args.keep,
        "schedule": schedule,
        "steps": steps,
        "guidance": plan.guidance,
        "sampler": args.sampler,
        "size": list(size),
        "model": {"name": args.model, "spec": model.spec.name, "vlm": model.vlm.identity},
        "warning": untrained,
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
    from ..conditioning import verifi
    from ..conditioning.vlm import Request, load_image

    start = time.perf_counter()
    images = tuple(map(load_image, args.image))
    vlm = _vlm(args)
    request = Request(args.prompt, images, max_tiles=args.max_tiles, token_budget=args.token_budget)
    stream = _Stream()
    with counted_bar(args, args.max_new_tokens, "rewriting", shown=not sys.stdout.isatty()) as bar:

        def on_token(row: int, token: int, text: str) -> None:
            bar.update()
            if sys.stdout.isatty():
                stream.show(text)

        result = verifi.rewrite(vlm, [request], on_token=on_token, **_rewriting(args)).results[0]
    stream.show(result.text)
    print()
    _warn_of_unknown_words(vlm, args.prompt)
    return {
        "prompt": args.prompt,
        "images": [str(path) for path in args.image],
        "text": result.text,
        "rewrite": json.loads(result.to_json()),
        "seconds": time.perf_counter() - start,
    }


def _untrained(model: UniFusion, images: bool) -> str | None:
    """What to say of image tokens that a model never saw in training."""
    if not images or model.profile is None or model.profile.images == "trained":
        return None
    return (
        f"the open weights of {model.profile.title} were trained on text alone: image tokens give a semantic variation "
        "of a picture, not an edit or a copy of it"
    )


def _size_of(image: Image.Image, multiple: int) -> tuple[int, int]:
    """The size of a source picture, shrunk to LONGEST_EDIT_SIDE and rounded to what the model can draw."""
    scale = min(1, LONGEST_EDIT_SIDE / max(image.size))
    width, height = (max(multiple, math.floor(side * scale / multiple + 0.5) * multiple) for side in image.size)
    return width, height


def _rewriting(args: argparse.Namespace) -> Report:
    names = ("max_new_tokens", "temperature", "seed", "think", "protect_quotes")
    return {name: getattr(args, name) for name in names}


def _vlm(args: argparse.Namespace) -> FrozenVLM:
    """The VLM of --vlm, else that of the model."""
    if args.vlm is None:
        return loader(args)().vlm
    from ..conditioning.vlm import load_vlm

    check_device(args.device)
    return load_vlm(args.vlm, device=args.device, tokenizer=args.tokenizer)


def _replayed(args: argparse.Namespace, model: UniFusion, request: Request) -> Conditions:
    """Conditions from the rewrite that an earlier picture or report holds."""
    from ..conditioning.verifi import Rewrite, Rewrites, replay

    rewrite = Rewrite.from_json(json.dumps(_record_of(args.replay)))
    hidden = replay(model.vlm, [request], [rewrite])
    rewrites = Rewrites((rewrite,), hidden)
    conditions = model.conditions(hidden, model.kinds(True, args.keep))
    return replace(conditions, texts=(rewrite.text,), rewrites=rewrites)


def _record_of(path: Path) -> dict[str, Any]:
    """The rewrite that a picture or a report holds."""
    from ..files import read_record

    if not path.is_file():
        raise ValueError(f"--replay {path}: no such file")
    if path.suffix.lower() == ".png":
        data = read_record(path)
    else:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"--replay {path}: neither a .png nor JSON ({error})") from None
    found = data.get("rewrite") if isinstance(data, dict) else None
    if not isinstance(found, dict):
        raise ValueError(
            f"--replay {path}: holds no rewrite; give a picture that was made with one, or its --json report"
        )
    return found


def _warn_of_unknown_words(vlm: FrozenVLM, prompt: str) -> None:
    """Names the words that the tokenizer reads as its unknown token, whose meaning is thereby lost."""
    unknown = vlm.tokenizer.unk_token_id
    if unknown is None:
        return
    tokens = vlm.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
    pairs = zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
    words = list(dict.fromkeys(prompt[start:stop] for token, (start, stop) in pairs if token == unknown))
    if words:
        warn(f"words that this model does not know: {some(words)}")


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
