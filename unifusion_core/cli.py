"""The command line, `unifusion VERB …`. What is heavy is imported once a verb runs, so that --help is instant."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .verbs import (
    RECIPES,
    bench,
    check_target,
    demo,
    evaluate_micro,
    evaluate_reconstruction,
    generate,
    rewrite,
    train,
)


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
        [_common(), _model(), _request()],
        "draw a picture",
        'unifusion generate "a red heart at top-left and a star" --out heart.png\n'
        '  unifusion generate "make the heart blue" --image heart.png --edit --out blue.png',
    )
    verb.add_argument("--edit", action="store_true", help="change the first --image; the picture takes its size")
    verb.add_argument("--schedule", metavar="S", help="who speaks when, as 'image:0-0.15, text:0.15-1' (default: all)")
    verb.add_argument("--no-rewrite", dest="rewrite", action="store_false", help="use the prompt's own tokens")
    verb.add_argument("--steps", type=_whole(1, 10_000), metavar="N", help="default: the model's, 20 for micro")
    verb.add_argument("--guidance", type=_number, metavar="G", help="1 = none (default: the model's)")
    verb.add_argument("--size", type=_size, metavar="WxH", help="in px (default: 64x64, or the source's with --edit)")
    verb.add_argument("--sampler", choices=("euler", "heun"), default="euler", help="default: euler")
    verb.add_argument(
        "--count", type=_whole(1, 256), default=1, metavar="N", help="pictures F-1.png … F-N.png, of seeds S, S+1, …"
    )
    verb.add_argument("--out", type=Path, required=True, metavar="F.png", help="where the picture goes")

    _verb(
        verbs,
        "rewrite",
        rewrite,
        [_common(), _model(), _request()],
        "print what the VLM makes of a prompt (VERIFI)",
        'unifusion rewrite "the shape with three sides in the color of grass"',
    )

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

    verb = _verb(
        verbs, "bench", bench, [_common(), _model()], "measure speed, as ratios", "unifusion bench --json bench.json"
    )
    verb.add_argument("--comfy", action="store_true", help="of the node pack in the ComfyUI on this machine instead")

    verb = _verb(
        verbs,
        "train",
        train,
        [_common()],
        "train the micro model",
        "unifusion train micro-vae --out runs/micro --steps 100",
    )
    verb.add_argument(
        "--compile", action="store_true", help="compile the transformer blocks of stages 1 and 2; needs a C++ compiler"
    )
    verb.add_argument("recipe", nargs="?", choices=tuple(RECIPES), metavar="RECIPE", help=", ".join(RECIPES))
    verb.add_argument("--out", type=Path, metavar="DIR", help="folder for weights and logs")
    verb.add_argument("--steps", type=_whole(1), metavar="N", help="default: the recipe's")
    verb.add_argument("--list", action="store_true", help="describe the recipes")
    verb.set_defaults(device=None)  # accelerate chooses
    return parser


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


def _model() -> argparse.ArgumentParser:
    options = _Parser(add_help=False)
    options.add_argument("--model", default="micro", help="micro (default), micro-base, or a model folder")
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
    return options


def _whole(low: int, high: int | None = None) -> Callable[[str], int]:
    limits = f"of at least {low}" if high is None else f"from {low} to {high}"

    def read(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,20}", text) or not low <= int(text) <= (math.inf if high is None else high):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {limits}")
        return int(text)

    return read


def _list(low: int) -> Callable[[str], tuple[int, ...]]:
    return lambda text: tuple(map(_whole(low), text.split(",")))


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,6})[xX]([0-9]{1,6})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size in px, such as 64x64")
    return int(match[1]), int(match[2])
