"""The command line, `unifusion VERB …`. What is heavy is imported once a verb runs, so that --help is instant."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .verbs import (
    LARGE,
    RECIPES,
    bench,
    check_target,
    demo,
    evaluate_ab,
    evaluate_dpg,
    evaluate_micro,
    evaluate_reconstruction,
    evaluate_vqa,
    generate,
    reproduce,
    rewrite,
    train,
)

KEEP_MODES = ("rewrite", "image + rewrite", "user turn", "think + rewrite", "think", "all", "everything", "image")

CONDITIONINGS = ("lap", "last", "penultimate", "keys", "injection", "lap-per-block")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns 0, 2 after an error of one line on stderr, or 130 after Ctrl+C."""
    args = _parser().parse_args(argv)
    try:
        if args.json:
            check_target(args.json)
        report = args.run(args)
        if args.json:
            from .files import save_json

            save_json(args.json, report)
    except (ValueError, OSError) as error:
        print(f"unifusion: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"unifusion: error: {' '.join(message.split())} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="unifusion",
        description="Pictures from prompts and pictures, with a vision-language model as the only encoder.",
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    verb = _verb(
        verbs, "demo", demo, [_common(), _model()], "show all the embedded model can do", "unifusion demo --out demo"
    )
    verb.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for pictures and demo.json")

    verb = _verb(
        verbs,
        "generate",
        generate,
        [_common(), _model(), _krea2(), _request()],
        "draw a picture",
        'unifusion generate "a red heart at top-left and a star" --out heart.png\n'
        '  unifusion generate "make the heart blue" --image heart.png --edit --out blue.png',
    )
    verb.add_argument("--edit", action="store_true", help="change the first --image; the picture takes its size")
    verb.add_argument("--schedule", metavar="S", help="who speaks when, as 'image:0-0.15, text:0.15-1' (default: all)")
    modes = ", ".join(map(repr, KEEP_MODES))
    verb.add_argument("--keep", choices=KEEP_MODES, metavar="MODE", help=f"tokens that guide the picture: {modes}")
    words = verb.add_mutually_exclusive_group()
    words.add_argument("--no-rewrite", dest="rewrite", action="store_false", help="use the prompt's own tokens")
    words.add_argument("--replay", type=Path, metavar="F", help="take the rewrite of an earlier .png or --json report")
    verb.add_argument("--steps", type=_whole(1, 10_000), metavar="N", help="default: the model's, 20 for micro")
    verb.add_argument("--guidance", type=_number, metavar="G", help="1 = none (default: the model's)")
    verb.add_argument("--size", type=_size, metavar="WxH", help="in px (default: 64x64, or the source's with --edit)")
    verb.add_argument("--sampler", choices=("euler", "heun"), default="euler", help="default: euler")
    verb.add_argument(
        "--count", type=_whole(1, 256), default=1, metavar="N", help="pictures F-1.png … F-N.png, of seeds S, S+1, …"
    )
    verb.add_argument("--out", type=Path, required=True, metavar="F.png", help="where the picture goes")

    verb = _verb(
        verbs,
        "rewrite",
        rewrite,
        [_common(), _model(), _krea2(), _request()],
        "print what the VLM makes of a prompt (VERIFI)",
        'unifusion rewrite "the shape with three sides in the color of grass"\n'
        '  unifusion rewrite "make it night" --image street.png --vlm Qwen3-VL-4B-Instruct',
    )
    verb.add_argument("--vlm", type=Path, metavar="DIR|F", help="any VLM by itself, instead of a model's (--model)")

    suites = _verb(verbs, "evaluate", None, [], "score a model", "unifusion evaluate micro --n 200 --json scores.json")
    suites = suites.add_subparsers(title="suites", metavar="SUITE", required=True)
    suite = _verb(
        suites,
        "micro",
        evaluate_micro,
        [_common(), _model()],
        "prompts and edits of the micro-world",
        "unifusion evaluate micro --split heldout --n 200 --seeds 0,1",
    )
    suite.add_argument("--split", choices=("heldout", "train"), default="heldout", help="default: heldout")
    suite.add_argument(
        "--n", type=_whole(1), default=200, metavar="N", help="cases of each kind and seed (default: 200)"
    )
    suite.add_argument("--seeds", type=_list(0), metavar="S,…", help="default: that of --seed and the next")
    suite = _verb(
        suites,
        "reconstruction",
        evaluate_reconstruction,
        [_common(), _model()],
        "pictures drawn again from their tokens",
        "unifusion evaluate reconstruction --tiles 1,4,9",
    )
    suite.add_argument("--tiles", type=_list(1), default=(1, 4, 9), metavar="N,…", help="default: 1,4,9")
    suite.add_argument("--cells", type=_whole(1, 6), default=6, metavar="C", help="of 32 px a side (default: 6)")
    suite.add_argument("--n", type=_whole(1), default=100, metavar="N", help="pictures (default: 100)")
    _judged_suites(suites)

    verb = _verb(
        verbs, "bench", bench, [_common(), _model()], "measure speed, as ratios", "unifusion bench --json bench.json"
    )
    where = verb.add_mutually_exclusive_group()
    where.add_argument("--comfy", action="store_true", help="of the node pack in the ComfyUI on this machine instead")
    where.add_argument("--gpu", action="store_true", help="of the paper's sizes, random weights, on this card")

    _reproduce(verbs)

    verb = _verb(
        verbs,
        "train",
        train,
        [_common(), _own_data()],
        "train the micro model, or a model of any size on your own pictures",
        "unifusion train micro-vae --out runs/micro --steps 100\n"
        "  unifusion train generator --preset unifusion-8b --vlm InternVL3-8B-hf --vae vae.safetensors --data shards "
        "--out stage1\n"
        "  unifusion train generator --init stage1/model.safetensors --stage 2 --vlm InternVL3-8B-hf "
        "--vae vae.safetensors --data edits --out stage2\n"
        "  unifusion train adapter --profile z-image --host Z-Image --data shards --out adapter",
    )
    verb.add_argument(
        "--compile", action="store_true", help="compile the transformer blocks of what learns; needs a C++ compiler"
    )
    verb.add_argument(
        "recipe", nargs="?", choices=(*RECIPES, *LARGE), metavar="RECIPE", help=", ".join((*RECIPES, *LARGE))
    )
    verb.add_argument("--out", type=Path, metavar="DIR", help="folder for weights and logs")
    verb.add_argument("--steps", type=_whole(1), metavar="N", help="default: the recipe's")
    verb.add_argument("--list", action="store_true", help="describe the recipes")
    verb.add_argument("--plan", metavar="PRESET", help="what a training would cost, computed: unifusion-8b, z-image, …")
    verb.add_argument("--gpus", type=_list(1), default=(1, 8, 64), metavar="N,…", help="of the plan (default: 1,8,64)")
    verb.set_defaults(device=None)  # accelerate chooses
    return parser


def _reproduce(verbs) -> None:
    """The paper's claims."""
    verb = _verb(
        verbs,
        "reproduce",
        reproduce,
        [_common()],
        "repeat the paper's claims at toy scale",
        "unifusion reproduce all --list\n  unifusion reproduce conditioning --jobs 2 --json conditioning.json",
    )
    verb.add_argument(
        "claim", nargs="?", default="all", metavar="CLAIM", help="all (default), or one that --list names"
    )
    verb.add_argument(
        "--out", type=Path, default=Path("reproduce"), metavar="DIR", help="for arms and results; goes on there"
    )
    verb.add_argument("--seeds", type=_whole(1), default=3, metavar="N", help="from that of --seed on (default: 3)")
    verb.add_argument("--steps", type=_whole(1), metavar="N", help="of the reference arm; the others cost the same")
    verb.add_argument("--n", type=_whole(1), default=200, metavar="N", help="cases of a measure (default: 200)")
    verb.add_argument("--jobs", type=_whole(1), default=1, metavar="J", help="processes of one thread (default: 1)")
    verb.add_argument("--list", action="store_true", help="show the claims, their arms and what they would cost here")
    verb.add_argument("--markdown", type=Path, metavar="F.md", help="write a page, with its pictures in a folder F")


def _own_data() -> argparse.ArgumentParser:
    """Of `train generator` and `train adapter`; None where their modules in `training` or the preset decide."""
    parent = _Parser(add_help=False)
    adapter = parent.add_argument_group("adapter: LAP before a frozen DiT")
    profiles = "z-image, klein-4b, klein-9b, boogu or boogu-edit"
    adapter.add_argument("--profile", metavar="P", help=f"what the DiT is: {profiles}")
    what = "its model, not distilled, in diffusers' layout, or its folder transformer"
    adapter.add_argument("--host", type=Path, metavar="DIR", help=what)
    generator = parent.add_argument_group("generator: LAP, refiner and DiT")
    generator.add_argument("--preset", metavar="P", help="start from nothing at the sizes of this preset")
    generator.add_argument("--init", type=Path, metavar="F", help="go on from the weights of this model file")
    generator.add_argument("--stage", type=int, choices=(1, 2), help="1: text, pictures, both; 2: edits (default: 1)")
    generator.add_argument("--copy-vlm", action="store_true", default=None, help="copy the VLM into OUT, not link it")
    what = (
        "keep the VLM's states on disk too: 2LE bytes a token, for unifusion-8b 65 kB (6 MB a caption of 100 tokens, "
    )
    what += "165 MB a picture of 9 tiles)"
    generator.add_argument("--cache-states", action="store_true", default=None, help=what)
    options = parent.add_argument_group("both: on your own pictures")
    what = "folder of the frozen VLM, or of a T5 (adapter: default the host's)"
    options.add_argument("--vlm", type=Path, metavar="DIR", help=what)
    what = f"what the DiT is conditioned by: {', '.join(CONDITIONINGS)} (default: lap)"
    generator.add_argument("--conditioning", choices=CONDITIONINGS, metavar="C", help=what)
    what = "after or before LAP, or none (default: after LAP, none beside its rivals)"
    generator.add_argument("--refiner", choices=("after", "before", "none"), metavar="PLACE", help=what)
    what = "of the VLM: every, third, or numbers as 2,5,8 (default: third)"
    generator.add_argument("--layers", type=_layers, metavar="every|third|N,…", help=what)
    what = "file or folder of the frozen VAE (adapter: default the host's)"
    options.add_argument("--vae", type=Path, metavar="F", help=what)
    what = "folder or .tar of NAME.png + NAME.txt, or of edits; may be repeated"
    options.add_argument("--data", type=Path, action="append", metavar="PATH", help=what)
    options.add_argument(
        "--batch", type=_whole(1), metavar="N", help="samples a step, over all processes (default: 32)"
    )
    options.add_argument("--accumulation", type=_whole(1), metavar="N", help="parts of a step's batch (default: 1)")
    options.add_argument("--size", dest="side", type=_whole(1), metavar="PX", help="of the square (default: 512)")
    options.add_argument("--rate", type=_number, metavar="R", help="learning rate (default: 1e-4)")
    options.add_argument("--warmup", type=_whole(0), metavar="N", help="steps in which the rate rises (default: 100)")
    options.add_argument("--ema", type=_number, metavar="D", help="decay of the average; 0 = none (default: 0.9999)")
    options.add_argument(
        "--tiles", type=_list(1), metavar="N,…", help="most tiles of a picture, in turn (default: 4,9; adapter: 1)"
    )
    what = "of text, picture, joint (default: 0.7,0.2,0.1; 1,0,0 before a host whose VLM sees no pictures)"
    options.add_argument("--mix", type=_shares, metavar="T,P,J", help=what)
    options.add_argument("--dropout", type=_number, metavar="S", help="share of empty conditions (default: 0.1)")
    options.add_argument("--most-damaged", type=_number, metavar="S", help="share of samples to skip (default: 0.01)")
    options.add_argument("--fsdp", action="store_true", default=None, help="cut the model over the processes (FSDP2)")
    options.add_argument(
        "--checkpointing", action="store_true", default=None, help="compute activations again: less memory"
    )
    options.add_argument("--precision", choices=("auto", "bf16", "fp32"), help="default: bf16 where the GPU has it")
    options.add_argument("--save-every", type=_whole(1), metavar="N", help="steps between states (default: 500)")
    options.add_argument(
        "--cache", type=Path, metavar="DIR", help="for latents, states and lists of samples (default: OUT/cache)"
    )
    options.add_argument(
        "--weights", choices=("bfloat16", "float16", "float32"), help="of the file (default: bfloat16)"
    )
    options.add_argument("--workers", type=_whole(1), metavar="N", help="threads that read samples (default: 4)")
    return parent


def _judged_suites(suites) -> None:
    """Those in which a VLM or people look at pictures."""
    benchmark = [_common(), _model(default=None), _krea2(), _benchmark()]
    suite = _verb(
        suites,
        "dpg",
        evaluate_dpg,
        benchmark,
        "DPG-Bench, refined: questions about pictures, answered by a VLM that reasons first",
        "unifusion evaluate dpg --prompts prompts --questions dpg_bench.csv --images pictures --judge VLM --out dpg\n"
        "  unifusion evaluate dpg --prompts prompts --questions dpg_bench.csv --model MODEL --judge VLM --out dpg",
    )
    suite.add_argument("--questions", type=Path, required=True, metavar="CSV", help="DPG-Bench's dpg_bench.csv")
    suite.add_argument("--questions-sha256", metavar="HASH", help="refuse another csv than this")
    suite.add_argument(
        "--max-new-tokens",
        type=_whole(1),
        default=512,
        metavar="N",
        help="of a reply with its reasons (default: 512)",
    )
    suite.add_argument(
        "--failures", type=_whole(0), default=24, metavar="N", help="pictures on contact sheets (default: 24)"
    )

    suite = _verb(
        suites,
        "vqa",
        evaluate_vqa,
        benchmark,
        "VQAScore: how likely a VLM says that a picture shows its prompt",
        "unifusion evaluate vqa --prompts genai_image.json --skills genai_skills.json --images pictures --judge VLM "
        "--out vqa",
    )
    suite.add_argument("--skills", type=Path, metavar="JSON", help="{tag: [ids]}, as GenAI-Bench's genai_skills.json")

    suite = _verb(
        suites,
        "ab",
        evaluate_ab,
        [_common()],
        "people choose between two models: a page to vote on, and what the votes come to",
        "unifusion evaluate ab --a ours --b theirs --prompts prompts --out vote.html\n"
        "  unifusion evaluate ab --votes votes-*.json --json ab.json",
    )
    suite.add_argument("--a", type=Path, metavar="DIR", help="pictures of the first model")
    suite.add_argument("--b", type=Path, metavar="DIR", help="pictures of the second, of the same names")
    suite.add_argument("--names", metavar="A,B", help="of the models, which voters never see (default: the folders')")
    suite.add_argument("--prompts", type=Path, metavar="DIR|F", help="shown above the pictures: .txt, .json or .csv")
    suite.add_argument("--sources", type=Path, metavar="DIR", help="pictures before the edit, shown beside")
    suite.add_argument(
        "--question", action="append", metavar="Q", help="may be repeated (default: Which picture is better?)"
    )
    suite.add_argument("--out", type=Path, metavar="F.html", help="where the page goes")
    suite.add_argument("--votes", type=Path, nargs="+", metavar="F", help="files that voters saved: count them")
    suite.add_argument(
        "--least", type=_whole(1), default=3, metavar="N", help="votes a pair needs to count (default: 3)"
    )


def _benchmark() -> argparse.ArgumentParser:
    options = _Parser(add_help=False)
    options.add_argument("--prompts", type=Path, required=True, metavar="DIR|F", help="folder of ID.txt, .json or .csv")
    options.add_argument("--prompts-sha256", metavar="HASH", help="refuse other prompts than these")
    options.add_argument("--images", type=Path, metavar="DIR", help="pictures ID.png, ID-1.png … or ID/*.png")
    options.add_argument("--grid", type=_grid, metavar="RxC", help="each of --images is a sheet of so many, as 2x2")
    options.add_argument("--judge", type=Path, required=True, metavar="DIR", help="folder of the VLM that judges")
    options.add_argument("--out", type=Path, required=True, metavar="DIR", help="for answers and scores; goes on there")
    options.add_argument("--n", type=_whole(1), metavar="N", help="of the prompts the first N (default: all)")
    options.add_argument("--batch-size", type=_whole(1), default=8, metavar="N", help="questions at once (default: 8)")
    options.add_argument(
        "--max-tiles", type=_whole(1, 100), default=9, metavar="N", help="of a picture for the judge (default: 9)"
    )
    drawing = options.add_argument_group("with --model")
    drawing.add_argument(
        "--count",
        type=_whole(1, 256),
        default=4,
        metavar="N",
        help="pictures each, of seeds S, S+1 … (default: 4)",
    )
    drawing.add_argument("--no-rewrite", dest="rewrite", action="store_false", help="use the prompt's own tokens")
    drawing.add_argument("--steps", type=_whole(1, 10_000), metavar="N", help="default: the model's")
    drawing.add_argument("--guidance", type=_number, metavar="G", help="default: the model's")
    drawing.add_argument("--size", type=_size, metavar="WxH", help="in px (default: the model's)")
    return options


def _verb(verbs, name: str, run, parents: list, what: str, example: str) -> argparse.ArgumentParser:
    parser = verbs.add_parser(
        name,
        parents=parents,
        help=what,
        description=f"{what[0].upper()}{what[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


def _common() -> argparse.ArgumentParser:
    options = _Parser(add_help=False)
    options.add_argument("--json", type=Path, metavar="FILE", help="write all that is printed, and more, as JSON")
    options.add_argument("--seed", type=_whole(0, 2**64 - 1), default=0, metavar="S", help="default: 0")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu (train: what is there)")
    options.add_argument("--quiet", action="store_true", help="no progress bars, no notes")
    return options


def _model(default: str | None = "micro") -> argparse.ArgumentParser:
    options = _Parser(add_help=False)
    names = f"micro{' (default)' if default else ''}, micro-base, or a folder or file of a model"
    options.add_argument("--model", default=default, help=names)
    return options


def _krea2() -> argparse.ArgumentParser:
    options = _Parser(add_help=False)
    what = "with a single file of Krea 2 as --model: "
    options.add_argument("--text-encoder", type=Path, metavar="F", help=what + "its qwen3vl_4b file or folder")
    options.add_argument("--vae", type=Path, metavar="F", help=what + "its qwen_image_vae file or folder")
    options.add_argument("--tokenizer", type=Path, metavar="DIR", help=what + "the folder of its tokenizer")
    options.add_argument(
        "--turbo",
        action=argparse.BooleanOptionalAction,
        help="whether Krea 2 is the few-step model (default: as its folder or its name says)",
    )
    return options


def _request() -> argparse.ArgumentParser:
    options = _Parser(add_help=False)
    options.add_argument("prompt", metavar="PROMPT", help="what the picture should show, or what should change")
    options.add_argument(
        "--image", type=Path, action="append", default=[], metavar="F", help="a picture to look at; may be repeated"
    )
    options.add_argument("--max-tiles", type=_whole(1, 100), default=9, metavar="N", help="per picture (default: 9)")
    options.add_argument("--temperature", type=_number, default=0.0, help="of the rewrite (default: 0, greedy)")
    options.add_argument(
        "--max-new-tokens", type=_whole(1), default=128, metavar="N", help="of the rewrite (default: 128)"
    )
    options.add_argument("--token-budget", type=_whole(1), metavar="N", help="most tokens of all pictures together")
    options.add_argument(
        "--think", type=_think, default="keep", metavar="keep|drop|N", help="what a VLM thinks first; N: tokens at most"
    )
    options.add_argument(
        "--protect-quotes", action="store_true", help="strings in quotation marks must come back letter by letter"
    )
    return options


def _think(text: str) -> str | int:
    return text if text in ("keep", "drop") else _whole(1)(text)


def _whole(low: int, high: int | None = None) -> Callable[[str], int]:
    limits = f"of at least {low}" if high is None else f"from {low} to {high}"

    def read(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,20}", text) or not low <= int(text) <= (math.inf if high is None else high):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {limits}")
        return int(text)

    return read


def _list(low: int) -> Callable[[str], tuple[int, ...]]:
    return lambda text: tuple(map(_whole(low), text.split(",")))


def _layers(text: str) -> str | tuple[int, ...]:
    return text if text in ("every", "third") else _list(0)(text)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def _shares(text: str) -> tuple[float, float, float]:
    shares = tuple(map(_number, text.split(",")))
    if len(shares) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} is not three shares, such as 0.7,0.2,0.1")
    return shares


def _grid(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9])[xX]([1-9])", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of rows and columns, such as 2x2")
    return int(match[1]), int(match[2])


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,6})[xX]([0-9]{1,6})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size in px, such as 64x64")
    return int(match[1]), int(match[2])
