"""What the verbs share: models, checks, notes and bars."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    from ..pipeline import UniFusion

Report = dict[str, Any]


def loader(args: argparse.Namespace) -> Callable[..., UniFusion]:
    """Returns load(name), which loads each model once; a --model of the user's stands in for the embedded ones."""
    from ..pipeline import load_model

    check_device(args.device)
    parts = {name: getattr(args, name, None) for name in ("text_encoder", "vae", "tokenizer")}
    parts["distilled"] = getattr(args, "turbo", None)

    @cache
    def load(name: str) -> UniFusion:
        model = load_model(name, device=args.device, **parts)
        if parts["distilled"] is None and model.spec.name.startswith("krea2") and Path(name).is_file():
            kind = "few-step model" if model.spec.name == "krea2-turbo" else "base model"
            note(args, f"{Path(name).name} is taken as the {kind}, by its name alone; --turbo or --no-turbo says so")
        return model

    return lambda name="micro": load(name if args.model == "micro" else args.model)


def check_device(device: str) -> None:
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


def some(names: Sequence[str], mark: str = ", ") -> str:
    """The first eight of them, and how many more there are."""
    return mark.join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def warn(text: str) -> None:
    print(f"unifusion: warning: {text}", file=sys.stderr)


def note(args: argparse.Namespace, text: str) -> None:
    if not args.quiet:
        print(f"unifusion: note: {text}", file=sys.stderr)


@contextmanager
def counted_bar(args: argparse.Namespace, total: int | None, what: str, shown: bool = True) -> Iterator:
    """A progress bar that leaves no trace; drawn on a terminal only."""
    from tqdm import tqdm

    with tqdm(total=total, desc=what, leave=False, disable=None if shown and not args.quiet else True) as drawn:
        yield drawn


@contextmanager
def part_bar(args: argparse.Namespace) -> Iterator[Callable[[str, int, int], None]]:
    """A bar as progress(part, done, total)."""
    with counted_bar(args, None, "") as bar:

        def progress(part: str, done: int, total: int) -> None:
            bar.total = total
            bar.set_description(part, refresh=False)
            bar.n = done
            bar.refresh()

        yield progress
