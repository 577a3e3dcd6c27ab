"""The verbs that measure: evaluate, bench, reproduce."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .common import Report, check_device, check_target, loader, note, part_bar, some, warn

if TYPE_CHECKING:
    import argparse

    from ..evaluation.judge import VLMJudge
    from ..evaluation.pictures import Picture
    from ..evaluation.prompt_sets import Prompt


def evaluate_micro(args: argparse.Namespace) -> Report:
    from ..evaluation import micro, report

    with part_bar(args) as progress:
        scores = micro.evaluate(
            loader(args),
            split=args.split,
            num=args.n,
            seeds=args.seeds or (args.seed, args.seed + 1),
            progress=progress,
        )
    print(report.table(scores))
    return scores


def evaluate_reconstruction(args: argparse.Namespace) -> Report:
    from ..evaluation import reconstruction, report

    with part_bar(args) as progress:
        scores = reconstruction.evaluate(
            loader(args), tiles=args.tiles, cells=args.cells, num=args.n, seed=args.seed, progress=progress
        )
    print(report.table(scores))
    return scores


def evaluate_dpg(args: argparse.Namespace) -> Report:
    from ..evaluation import dpg_bench, failures
    from ..evaluation.dpg_scores import table
    from ..evaluation.prompt_sets import check_digest, read_prompts
    from ..files import save_json, save_png

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
    with part_bar(args) as progress:
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
        warn(
            f"the judge decided nothing in {undecided['answers']} of {undecided['of']} replies, which count neither "
            f"way; undecided.bounds in {args.out / 'report.json'} says what they could change"
        )
    if meta["without_pictures"]:
        warn(f"prompts without a picture, not in the scores: {some(meta['without_pictures'])}")
    if meta["csv_notes"]:
        note(args, f"{args.questions}: {some(meta['csv_notes'], '; ')}")
    note(args, f"{args.out}: report.json, answers.jsonl and {len(pages)} contact sheets of failures")
    return scores


def evaluate_vqa(args: argparse.Namespace) -> Report:
    from ..evaluation import report, vqa_score
    from ..evaluation.prompt_sets import check_digest, read_prompts, with_skills
    from ..files import save_json

    _check_benchmark(args)
    prompts = read_prompts(args.prompts)
    digest = check_digest(args.prompts, args.prompts_sha256)
    if args.skills:
        prompts = with_skills(prompts, args.skills)
    prompts = dict(list(prompts.items())[: args.n])
    pictures = _pictures(args, prompts)
    judge = _judge(args, reasoning=False)
    with part_bar(args) as progress:
        scores = vqa_score.evaluate(
            prompts, pictures, judge, args.out / "answers.jsonl", batch_size=args.batch_size, progress=progress
        )
    scores["meta"]["prompts_sha256"] = digest
    save_json(args.out / "report.json", scores)
    print(report.table({key: value for key, value in scores.items() if key not in ("prompts", "meta")}))
    if (share := scores["answered"]["mean"]) < 0.5:
        warn(f"yes and no have {share:.2f} of the judge's probability: it says something else, so trust neither score")
    if without := scores["meta"]["without_pictures"]:
        warn(f"prompts without a picture, not in the scores: {some(without)}")
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
    from ..evaluation import ab_page
    from ..evaluation.prompt_sets import read_prompts

    check_target(args.out)
    names = tuple((args.names or f"{args.a.name},{args.b.name}").split(","))
    if len(names) != 2:
        raise ValueError(f"--names {args.names}: expected two names, as ours,theirs")
    texts = {name: prompt.text for name, prompt in read_prompts(args.prompts).items()} if args.prompts else None
    pairs, alone = ab_page.find_pairs(args.a, args.b, texts, args.sources)
    options = {"questions": args.question} if args.question else {}
    with part_bar(args) as progress:
        made = ab_page.write_page(args.out, pairs, names=names, seed=args.seed, progress=progress, **options)
    print(f"{args.out}  {len(pairs)} pairs, {made['bytes'] / 1e6:.1f} MB; open it in a browser, or send it to voters")
    if alone:
        warn(f"{len(alone)} pictures are in one folder only and make no pair: {some(alone)}")
    return {**made, "unpaired": alone}


def _count_votes(args: argparse.Namespace) -> Report:
    from ..evaluation import ab_votes, report

    found = ab_votes.evaluate(ab_votes.read_votes(args.votes), least=args.least, seed=args.seed)
    print(f"{found['first']} over {found['second']}, of {found['meta']['voters']} voters\n")
    for question, asked in found["questions"].items():
        shown = {key: value for key, value in asked.items() if key not in ("pairs", "lacking")}
        print(f"{question}\n{report.table(shown)}\n")
        if lacking := asked["lacking"]:
            few = f"{len(lacking)} pairs have fewer than {args.least} votes and do not count"
            warn(f"{question}: {few}: {some(list(lacking))}")
    print(report.table({"left": found["left"]}))
    return found


def bench(args: argparse.Namespace) -> Report:
    from ..evaluation import bench, bench_comfy, bench_gpu

    with part_bar(args) as progress:
        if args.comfy:
            report = bench_comfy.run(progress=progress)
        elif args.gpu:
            report = bench_gpu.run(progress=progress)
        else:
            report = bench.run(loader(args)(), seed=args.seed, progress=progress)
    print(bench.table(report))
    return report


def reproduce(args: argparse.Namespace) -> Report:
    from ..experiments import claims, costs, report, reproduce
    from ..experiments.results import Setting

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
    with part_bar(args) as progress:
        found = reproduce.run(chosen, args.out, **settings, progress=progress)
    print(report.table(found))
    files = report.draw(chosen, found, setting, args.out / "figures")
    note(args, f"{args.out}: report.json and {sum(map(len, files.values()))} pictures in figures")
    if args.markdown:
        report.write_page(args.markdown, chosen, found, setting)
        note(args, f"{args.markdown}, with its pictures in {args.markdown.with_suffix('').name}")
    return found


def _check_benchmark(args: argparse.Namespace) -> None:
    if bool(args.images) == bool(args.model):
        raise ValueError("give either --images DIR or --model M: pictures that are there, or a model that draws them")
    check_target(args.out / "report.json")


def _pictures(args: argparse.Namespace, prompts: Mapping[str, Prompt]) -> dict[str, list[Picture]]:
    """The pictures that a benchmark judges, found or drawn; a model that drew them is let go."""
    from ..evaluation.pictures import draw_pictures, find_pictures

    if args.images:
        return find_pictures(args.images, list(prompts), args.grid)
    settings = {"steps": args.steps, "guidance": args.guidance, "size": args.size}
    with part_bar(args) as progress:
        return draw_pictures(
            loader(args)(),
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
    from ..conditioning.vlm import load_vlm
    from ..evaluation.judge import VLMJudge

    check_device(args.device)
    inner = args.judge / "vlm"
    folder = inner if inner.is_dir() and not (args.judge / "config.json").is_file() else args.judge
    vlm = load_vlm(folder, layers=(0,), device=args.device)  # no state is looked at: tap as little as can be
    return VLMJudge(vlm, max_tiles=args.max_tiles, **settings)
