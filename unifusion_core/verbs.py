"""What each verb of the command line does: parsed arguments in, a JSON-able report out."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

    from .conditioning.vlm import FrozenVLM, Request
    from .evaluation.judge import VLMJudge
    from .evaluation.pictures import Picture
    from .evaluation.prompt_sets import Prompt
    from .pipeline import Conditions, UniFusion

LONGEST_EDIT_SIDE = 1024  # px; a photo edited without --size is shrunk to it
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
    from .pipeline import tracks_of

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
    tracks = tracks_of(model.kinds(args.rewrite, args.keep), bool(images))
    schedule = f"{'all' if 'all' in tracks else next(iter(tracks))}:0-1" if args.schedule is None else args.schedule
    sampling = {"steps": args.steps, "guidance": args.guidance, "size": size, "sampler": args.sampler}
    plan = model.plan(tracks, schedule=schedule, **sampling)
    steps = len(plan.timesteps) - 1
    for segment in silent_segments(parse_schedule(schedule), steps, plan.timesteps):
        _warn(f"segment '{segment}' of the schedule covers none of the {steps} steps")

    if untrained := _untrained(model, "image" in tracks):
        _warn(untrained)
    request = Request(args.prompt, tuple(images), max_tiles=args.max_tiles, token_budget=args.token_budget)
    if args.replay:
        conditions = _replayed(args, model, request)
    elif args.rewrite:
        with _bar(args, args.max_new_tokens, "rewriting") as bar:
            conditions = model.prepare([request], keep=args.keep, on_token=lambda *_: bar.update(), **_rewriting(args))
    else:
        conditions = model.prepare([request], rewriting=False, keep=args.keep)
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
    from .conditioning import verifi
    from .conditioning.vlm import Request, load_image

    start = time.perf_counter()
    images = tuple(map(load_image, args.image))
    vlm = _vlm(args)
    request = Request(args.prompt, images, max_tiles=args.max_tiles, token_budget=args.token_budget)
    stream = _Stream()
    with _bar(args, args.max_new_tokens, "rewriting", shown=not sys.stdout.isatty()) as bar:

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


def evaluate_dpg(args: argparse.Namespace) -> Report:
    from .evaluation import dpg_bench, failures
    from .evaluation.dpg_scores import table
    from .evaluation.prompt_sets import check_digest, read_prompts
    from .files import save_json, save_png

    _check_benchmark(args)
    prompts, questions = read_prompts(args.prompts), dpg_bench.read_questions(args.questions)
    digests = {
        "prompts_sha256": check_digest(args.prompts, args.prompts_sha256),
        "questions_sha256": check_digest(args.questions, args.questions_sha256),
    }
    if args.n:
        prompts = {name: prompts[name] for name in [name for name in prompts if name in questions.items][: args.n]}
        questions = questions.only(prompts)
    pictures = _pictures(args, {name: prompt for name, prompt in prompts.items() if name in questions.items})
    judge = _judge(args, reasoning=True, max_new_tokens=args.max_new_tokens)
    with _progress(args) as progress:
        scores = dpg_bench.evaluate(
            prompts,
            questions,
            pictures,
            judge,
            args.out / "answers.jsonl",
            batch_size=args.batch_size,
            seed=args.seed,
            progress=progress,
        )
    scores["meta"] |= {**digests, "prompts_are_published": digests["prompts_sha256"] == dpg_bench.PROMPTS_SHA256}
    save_json(args.out / "report.json", scores)
    shown = failures.worst(scores, questions.items, pictures, args.failures)
    pages = failures.sheets(shown, "The pictures that fail most questions")
    for old in args.out.glob("failures-*.png"):
        old.unlink()
    for number, page in enumerate(pages):
        save_png(args.out / f"failures-{number + 1}.png", page)
    print(table(scores))
    undecided, meta = scores["undecided"], scores["meta"]
    if undecided["answers"]:
        _warn(
            f"the judge decided nothing in {undecided['answers']} of {undecided['of']} replies, which count neither "
            f"way; undecided.bounds in {args.out / 'report.json'} says what they could change"
        )
    if meta["without_pictures"]:
        _warn(f"prompts without a picture, not in the scores: {_some(meta['without_pictures'])}")
    if meta["csv_notes"]:
        _note(args, f"{args.questions}: {_some(meta['csv_notes'], '; ')}")
    _note(args, f"{args.out}: report.json, answers.jsonl and {len(pages)} contact sheets of failures")
    return scores


def evaluate_vqa(args: argparse.Namespace) -> Report:
    from .evaluation import report, vqa_score
    from .evaluation.prompt_sets import check_digest, read_prompts, with_skills
    from .files import save_json

    _check_benchmark(args)
    prompts = read_prompts(args.prompts)
    digest = check_digest(args.prompts, args.prompts_sha256)
    if args.skills:
        prompts = with_skills(prompts, args.skills)
    prompts = dict(list(prompts.items())[: args.n])
    pictures = _pictures(args, prompts)
    judge = _judge(args, reasoning=False)
    with _progress(args) as progress:
        scores = vqa_score.evaluate(
            prompts, pictures, judge, args.out / "answers.jsonl", batch_size=args.batch_size, progress=progress
        )
    scores["meta"]["prompts_sha256"] = digest
    save_json(args.out / "report.json", scores)
    print(report.table({key: value for key, value in scores.items() if key not in ("prompts", "meta")}))
    if (share := scores["answered"]["mean"]) < 0.5:
        _warn(f"yes and no have {share:.2f} of the judge's probability: it says something else, so trust neither score")
    if without := scores["meta"]["without_pictures"]:
        _warn(f"prompts without a picture, not in the scores: {_some(without)}")
    return scores


def evaluate_ab(args: argparse.Namespace) -> Report:
    making = (args.a, args.b, args.prompts, args.sources, args.names, args.question, args.out)
    if args.votes:
        if any(making):
            raise ValueError("--votes counts what people voted; leave out what makes a page (--a, --b, --out ...)")
        return _count_votes(args)
    if not (args.a and args.b):
        raise ValueError("give --a DIR and --b DIR to make a page, or --votes F ... to count")
    if not args.out:
        raise ValueError("give --out F.html, where the page goes")
    from .evaluation import ab_page
    from .evaluation.prompt_sets import read_prompts

    check_target(args.out)
    names = tuple((args.names or f"{args.a.name},{args.b.name}").split(","))
    if len(names) != 2:
        raise ValueError(f"--names {args.names}: expected two names, as ours,theirs")
    texts = {name: prompt.text for name, prompt in read_prompts(args.prompts).items()} if args.prompts else None
    pairs, alone = ab_page.find_pairs(args.a, args.b, texts, args.sources)
    options = {"questions": args.question} if args.question else {}
    with _progress(args) as progress:
        made = ab_page.write_page(args.out, pairs, names=names, seed=args.seed, progress=progress, **options)
    print(f"{args.out}  {len(pairs)} pairs, {made['bytes'] / 1e6:.1f} MB; open it in a browser, or send it to voters")
    if alone:
        _warn(f"{len(alone)} pictures are in one folder only and make no pair: {_some(alone)}")
    return {**made, "unpaired": alone}


def _count_votes(args: argparse.Namespace) -> Report:
    from .evaluation import ab_votes, report

    found = ab_votes.evaluate(ab_votes.read_votes(args.votes), least=args.least, seed=args.seed)
    print(f"{found['first']} over {found['second']}, of {found['meta']['voters']} voters\n")
    for question, asked in found["questions"].items():
        shown = {key: value for key, value in asked.items() if key not in ("pairs", "lacking")}
        print(f"{question}\n{report.table(shown)}\n")
        if lacking := asked["lacking"]:
            few = f"{len(lacking)} pairs have fewer than {args.least} votes and do not count"
            _warn(f"{question}: {few}: {_some(list(lacking))}")
    print(report.table({"left": found["left"]}))
    return found


def bench(args: argparse.Namespace) -> Report:
    from .evaluation import bench, bench_comfy, bench_gpu

    with _progress(args) as progress:
        if args.comfy:
            report = bench_comfy.run(progress=progress)
        elif args.gpu:
            report = bench_gpu.run(progress=progress)
        else:
            report = bench.run(_loader(args)(), seed=args.seed, progress=progress)
    print(bench.table(report))
    return report


def reproduce(args: argparse.Namespace) -> Report:
    from .experiments import claims, costs, report, reproduce
    from .experiments.results import Setting

    chosen = claims.chosen(args.claim)
    seeds = range(args.seed, args.seed + args.seeds)
    setting = Setting(folder=args.out, steps=args.steps or reproduce.STEPS, num=args.n)
    if args.list:
        found = costs.estimate(chosen, seeds, setting)
        print(report.costs(found, jobs=args.jobs, seeds=len(seeds)))
        return found
    check_target(args.out / "report.json")
    if args.markdown:
        check_target(args.markdown)
    settings = {"seeds": seeds, "steps": setting.steps, "num": setting.num, "jobs": args.jobs}
    with _progress(args) as progress:
        found = reproduce.run(chosen, args.out, **settings, progress=progress)
    print(report.table(found))
    files = report.draw(chosen, found, setting, args.out / "figures")
    _note(args, f"{args.out}: report.json and {sum(map(len, files.values()))} pictures in figures")
    if args.markdown:
        report.write_page(args.markdown, chosen, found, setting)
        _note(args, f"{args.markdown}, with its pictures in {args.markdown.with_suffix('').name}")
    return found


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
    _check_device(args.device)
    given = [name for names in OWN_DATA.values() for name in names if getattr(args, name) is not None]
    given += [name for name in ("vlm", "vae", "data", "mix", "ema") if getattr(args, name) is not None]
    if args.recipe in LARGE:
        return _train_generator(args)
    if odd := [name for name in given if name != "steps"]:
        raise ValueError(f"--{odd[0].replace('_', '-').replace('side', 'size')} belongs to `train generator` only")
    from .training import recipes

    start = time.perf_counter()
    settings = {"seed": args.seed, "device": args.device, "steps": args.steps, "compile": args.compile}
    written = recipes.run(args.recipe, args.out, **settings)
    seconds = time.perf_counter() - start
    print(f"{written}  {args.recipe}, {seconds:.0f} s")
    return {"recipe": args.recipe, "written": str(written), "seed": args.seed, "steps": args.steps, "seconds": seconds}


def _train_generator(args: argparse.Namespace) -> Report:
    if missing := [name for name in ("vlm", "vae", "data") if not getattr(args, name)]:
        raise ValueError(f"train generator needs --{' and --'.join(missing)}")
    from dataclasses import replace

    from .training import generator

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
    from .presets import PRESETS
    from .training import plan

    if args.plan not in PRESETS:
        raise ValueError(f"--plan {args.plan!r}: expected one of {', '.join(PRESETS)}")
    report = plan.plan(PRESETS[args.plan](), args.gpus)
    print(plan.table(report))
    return report


# What verbs share.


def _loader(args: argparse.Namespace) -> Callable[..., UniFusion]:
    """Returns load(name), which loads each model once; a --model of the user's stands in for the embedded ones."""
    from .pipeline import load_model

    _check_device(args.device)
    parts = {name: getattr(args, name, None) for name in ("text_encoder", "vae", "tokenizer")}
    parts["distilled"] = getattr(args, "turbo", None)

    @cache
    def load(name: str) -> UniFusion:
        model = load_model(name, device=args.device, **parts)
        if parts["distilled"] is None and model.spec.name.startswith("krea2") and Path(name).is_file():
            kind = "few-step model" if model.spec.name == "krea2-turbo" else "base model"
            _note(args, f"{Path(name).name} is taken as the {kind}, by its name alone; --turbo or --no-turbo says so")
        return model

    return lambda name="micro": load(name if args.model == "micro" else args.model)


def _check_benchmark(args: argparse.Namespace) -> None:
    if bool(args.images) == bool(args.model):
        raise ValueError("give either --images DIR or --model M: pictures that are there, or a model that draws them")
    check_target(args.out / "report.json")


def _pictures(args: argparse.Namespace, prompts: Mapping[str, Prompt]) -> dict[str, list[Picture]]:
    """The pictures that a benchmark judges, found or drawn; a model that drew them is let go."""
    from .evaluation.pictures import draw_pictures, find_pictures

    if args.images:
        return find_pictures(args.images, list(prompts), args.grid)
    settings = {"steps": args.steps, "guidance": args.guidance, "size": args.size}
    with _progress(args) as progress:
        return draw_pictures(
            _loader(args)(),
            prompts,
            args.out / "images",
            count=args.count,
            seed=args.seed,
            name=args.model,
            rewriting=args.rewrite,
            progress=progress,
            **settings,
        )


def _judge(args: argparse.Namespace, **settings) -> VLMJudge:
    """The VLM of --judge, which may also be the folder of a whole model."""
    from .conditioning.vlm import load_vlm
    from .evaluation.judge import VLMJudge

    _check_device(args.device)
    inner = args.judge / "vlm"
    folder = inner if inner.is_dir() and not (args.judge / "config.json").is_file() else args.judge
    vlm = load_vlm(folder, layers=(0,), device=args.device)  # no state is looked at: tap as little as can be
    return VLMJudge(vlm, max_tiles=args.max_tiles, **settings)


def _untrained(model: UniFusion, images: bool) -> str | None:
    """What to say of image tokens that a model never saw in training."""
    if not images or model.profile is None or model.profile.images == "trained":
        return None
    return (
        f"the open weights of {model.profile.title} were trained on text alone: image tokens give a semantic variation "
        "of a picture, not an edit or a copy of it"
    )


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
    names = ("max_new_tokens", "temperature", "seed", "think", "protect_quotes")
    return {name: getattr(args, name) for name in names}


def _vlm(args: argparse.Namespace) -> FrozenVLM:
    """The VLM of --vlm, else that of the model."""
    if args.vlm is None:
        return _loader(args)().vlm
    from .conditioning.vlm import load_vlm

    _check_device(args.device)
    return load_vlm(args.vlm, device=args.device, tokenizer=args.tokenizer)


def _replayed(args: argparse.Namespace, model: UniFusion, request: Request) -> Conditions:
    """Conditions from the rewrite that an earlier picture or report holds."""
    from .conditioning.verifi import Rewrite, Rewrites, replay

    rewrite = Rewrite.from_json(json.dumps(_record_of(args.replay)))
    hidden = replay(model.vlm, [request], [rewrite])
    rewrites = Rewrites((rewrite,), hidden)
    conditions = model.conditions(hidden, model.kinds(True, args.keep))
    return replace(conditions, texts=(rewrite.text,), rewrites=rewrites)


def _record_of(path: Path) -> dict[str, Any]:
    """The rewrite that a picture or a report holds."""
    from .files import read_record

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
        _warn(f"words that this model does not know: {_some(words)}")


def _some(names: Sequence[str], mark: str = ", ") -> str:
    """The first eight of them, and how many more there are."""
    return mark.join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


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
