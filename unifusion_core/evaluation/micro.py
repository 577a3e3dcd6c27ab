"""Micro-world scores of the embedded models: what the oracle reads off their pictures, and what VERIFI writes.

On the split "heldout" every sentence pattern is one that training never saw, and every other case has a pair of colour
and shape that it never saw. Intervals pool the seeds and take pictures (for single details: things) as independent.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from random import Random
from statistics import fmean
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image

from ..conditioning.vlm import Request
from ..microworld.caption import caption, parse_caption
from ..microworld.edits import OPERATIONS, Composition, Edit, sample_composition, sample_edit
from ..microworld.oracle import Reading, attribute_scores, detail_scores, exact, read
from ..microworld.phrases import CAPTION_PATTERNS
from ..microworld.prompts import KINDS, Prompt, sample_prompt
from ..microworld.render import render
from ..microworld.scene import Scene, Thing, sample_scene
from ..pipeline import Conditions, UniFusion
from .report import harmonic, nest

Split = Literal["heldout", "train"]
Progress = Callable[[str, int, int], None]
Values = dict[tuple[str, ...], list[float]]
"""Key path in the report → what is averaged there."""

PATTERNS = {"heldout": "held_out", "train": "train"}
SHARES = (0.0, 0.1, 0.15, 0.2, 0.3, 1.0)  # of the image steps
WINDOW = (0.1, 0.15, 0.2)  # the paper's 10-20 %
MAX_NEW_TOKENS = 64  # the longest caption of this canvas has 34
NOISE_STRIDE = 1_000_000  # between the noises of two seeds
NOTES = {
    "rewrite": "prompts are scored by their constraints; edits and captions by equality of all named attributes",
    "verifi.off": "the mode without rewriting was not trained",
    "edit.preserved": "details of untouched things where something stands in their cell, which edit.found counts",
    "late_subject.prompt": "of three things the last mentioned is asked for indirectly, which training never does; "
    "the first is often named by fewer attributes than the last",
}

ORDER = ("text_to_image", "rewrite", "verifi", "edit", "zero_shot_edit", "multi_reference", "late_subject", "controls")

Case = TypeVar("Case")


@dataclass
class Run:
    """How cases are drawn and cut into batches; keeps the seconds per part."""

    split: Split = "heldout"
    seeds: Sequence[int] = (0, 1)
    batch_size: int = 20
    progress: Progress | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.split not in PATTERNS:
            raise ValueError(f"split must be one of {', '.join(PATTERNS)}, got {self.split!r}")
        if not self.seeds or self.batch_size < 1:
            raise ValueError(f"seeds {self.seeds}, batch_size {self.batch_size}: expected at least one of each")

    @property
    def patterns(self) -> str:
        return PATTERNS[self.split]

    def batches(
        self, part: str, make: Callable[[Random, int, bool], Case], num: int
    ) -> Iterator[tuple[list[Case], int, int]]:
        """Batches of `num` cases per seed, each with the number of its first case and its first noise.

        `make` is given random numbers, the case's number, and whether a held-out pair belongs into it. Neither cases
        nor noises depend on the batch size, and fewer cases are the first ones of more.
        """
        began, done = time.perf_counter(), 0
        for seed in self.seeds:
            rng = Random(f"{part}-{self.split}-{seed}")
            cases = [make(rng, index, self.split == "heldout" and index % 2 == 1) for index in range(num)]
            for start in range(0, num, self.batch_size):
                batch = cases[start : start + self.batch_size]
                yield batch, start, seed * NOISE_STRIDE + start
                done += len(batch)
                if self.progress:
                    self.progress(part, done, num * len(self.seeds))
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - began


def evaluate(
    load_model: Callable[[str], UniFusion],
    *,
    split: Split = "heldout",
    num: int = 200,
    seeds: Sequence[int] = (0, 1),
    batch_size: int = 20,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Scores "micro" and, for zero-shot editing, "micro-base".

    Args:
        load_model: name → model, as `pipeline.load_model`.
        num: cases per seed for text_to_image, each kind of rewrite, indirect prompts and edit; half as many for what
            else is drawn, and a quarter for VERIFI off and the controls of two references.
        progress: called with (part, cases done, cases of this part).
    Returns:
        Nested scores (`report.score`), with `meta` and `notes`; JSON-able.
    Raises:
        ValueError: an unknown split, a number below 1, or a VLM that wrote nothing.
    """
    if num < 1:
        raise ValueError(f"num {num}: expected at least 1")
    run = Run(split=split, seeds=tuple(seeds), batch_size=batch_size, progress=progress)
    half, quarter = max(1, num // 2), max(1, num // 4)

    model = load_model("micro")
    values: Values = defaultdict(list)
    text_to_image(values, model, run, num)
    values["rewrite", "exact"] = []  # stands first among its kind, and is filled from them
    prompts(values, model, run, num, drawn=half, drawn_off=quarter)
    captions(values, model, run, num)
    edits(values, model, run, num, controls=half)
    multi_reference(values, model, run, half, controls=quarter)
    late_subject(values, model, run, half)
    values["rewrite", "exact"] = [x for path, numbers in values.items() if path[0] == "rewrite" for x in numbers]
    meta = {"micro": _describe(model)}
    del model

    base = load_model("micro-base")
    zero_shot_edit(values, base, run, half)
    meta["micro-base"] = _describe(base)

    report = nest(dict(sorted(values.items(), key=lambda item: ORDER.index(item[0][0]))))
    summarize_shares(report["zero_shot_edit"])
    meta |= {
        "split": split,
        "num": num,
        "seeds": list(seeds),
        "batch_size": batch_size,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "seconds": {part: round(seconds, 1) for part, seconds in run.seconds.items()},
    }
    return {**report, "notes": dict(NOTES), "meta": meta}


# The parts. Each adds its values; pictures are scored by what the oracle reads off them.


def text_to_image(values: Values, model: UniFusion, run: Run, num: int) -> None:
    """Canonical captions as both prompt and rewrite; the VAE and the oracle themselves beside."""
    for scenes, _, noise in run.batches("text_to_image", lambda rng, _, odd: sample_scene(rng, held_out=odd), num):
        texts = [caption(scene) for scene in scenes]
        pictures = draw(model, model.replay([Request(text) for text in texts], texts), noise)
        truths = [render(scene) for scene in scenes]
        collect(values, ("text_to_image",), score_scenes(pictures, scenes))
        for control, images in (("vae_round_trip", round_trip(model, truths)), ("oracle_on_renders", truths)):
            values["controls", control, "exact"] += score_scenes(images, scenes)["exact"]


def prompts(values: Values, model: UniFusion, run: Run, num: int, *, drawn: int, drawn_off: int) -> None:
    """Prompts of every kind: the rewrite's text, and pictures of the first `drawn` (indirect: all).

    The first `drawn_off` are drawn without rewriting as well, except late ones.
    """
    for kind in (*KINDS, "late"):

        def make(rng: Random, _: int, odd: bool, kind: str = kind) -> Prompt:
            name, late = ("indirect", True) if kind == "late" else (kind, False)
            return sample_prompt(rng, name, split=run.patterns, held_out_pair=odd, late=late)

        for cases, start, noise in run.batches(f"verifi.{kind}", make, num):
            requests = [Request(case.text) for case in cases]
            conditions = model.prepare(requests, max_new_tokens=MAX_NEW_TOKENS)
            values["rewrite", kind] += [
                scene is not None and case.constraints.accepts(scene)
                for scene, case in zip(map(parsed, conditions.texts), cases, strict=True)
            ]
            if (left := (num if kind == "indirect" else drawn) - start) > 0:
                pictures = draw(model, conditions, noise)[:left]
                if kind == "late":
                    collect(values, ("late_subject", "prompt"), score_late_prompts(pictures, cases[:left]))
                else:
                    values["verifi", kind, "exact"] += score_prompts(pictures, cases[:left])
            if kind != "late" and (left := drawn_off - start) > 0:
                pictures = draw(model, model.prepare(requests[:left], rewriting=False), noise)
                values["verifi", "off", kind, "exact"] += score_prompts(pictures, cases[:left])


def captions(values: Values, model: UniFusion, run: Run, num: int) -> None:
    """VERIFI's description of a picture."""

    def make(rng: Random, _: int, odd: bool) -> tuple[str, Scene]:
        return rng.choice(CAPTION_PATTERNS[run.patterns]), sample_scene(rng, held_out=odd)

    for cases, _, _ in run.batches("rewrite.caption", make, num):
        requests = [Request(text, (render(scene),)) for text, scene in cases]
        texts = model.prepare(requests, max_new_tokens=MAX_NEW_TOKENS).texts
        values["rewrite", "caption"] += score_texts(texts, [scene for _, scene in cases])


def edits(values: Values, model: UniFusion, run: Run, num: int, *, controls: int) -> None:
    """Edits end to end with image and rewritten tokens; the controls take the first `controls` edits of each seed."""
    for cases, start, noise in run.batches("edit", _make_edit(run), num):
        sources = [render(edit.source) for edit in cases]
        requests = [Request(edit.instruction, (source,)) for edit, source in zip(cases, sources, strict=True)]
        conditions = model.prepare(requests, max_new_tokens=MAX_NEW_TOKENS)
        values["rewrite", "edit"] += score_texts(conditions.texts, [edit.target for edit in cases])

        scores = score_edits(draw(model, conditions, noise, schedule="all:0-1"), cases)
        values["edit", "success"] += scores.success
        for edit, success in zip(cases, scores.success, strict=True):
            values["edit", "success_by", edit.operation].append(success)
        values["edit", "preserved"] += scores.preserved
        collect(values, ("edit", "preserved_by"), scores.details)
        values["edit", "found"] += scores.found

        if (left := controls - start) > 0:
            truth = model.replay(requests[:left], [caption(edit.target) for edit in cases[:left]])
            pictures = {
                "unchanged_source": sources[:left],
                "text_only": draw(model, conditions, noise, schedule="text:0-1")[:left],
                "true_target_prompt": draw(model, truth, noise, schedule="all:0-1"),
                "vae_round_trip": round_trip(model, [render(edit.target) for edit in cases[:left]]),
            }
            for control, images in pictures.items():
                scores = score_edits(images, cases[:left])
                values["edit", "controls", control, "success"] += scores.success
                values["edit", "controls", control, "preserved"] += scores.preserved


def zero_shot_edit(values: Values, model: UniFusion, run: Run, num: int) -> None:
    """Edits by a model that never saw one: image tokens for the first share of the steps, then rewritten tokens."""
    for cases, _, noise in run.batches("zero_shot_edit", _make_edit(run), num):
        requests = [Request(edit.instruction, (render(edit.source),)) for edit in cases]
        conditions = model.prepare(requests, max_new_tokens=MAX_NEW_TOKENS)
        for share in SHARES:
            scores = score_edits(draw(model, conditions, noise, schedule=share_schedule(share)), cases)
            at = "zero_shot_edit", "share", f"{share:g}"
            values[(*at, "success")] += scores.success
            values[(*at, "preserved")] += scores.preserved


def multi_reference(values: Values, model: UniFusion, run: Run, num: int, *, controls: int) -> None:
    """Two reference pictures, one thing from each, by a model trained on one reference only."""

    def make(rng: Random, _: int, odd: bool) -> Composition:
        return sample_composition(rng, split=run.patterns, held_out_pair=odd)

    for cases, start, noise in run.batches("multi_reference", make, num):
        requests = [Request(case.instruction, tuple(render(scene) for scene in case.references)) for case in cases]
        conditions = model.prepare(requests, max_new_tokens=MAX_NEW_TOKENS)
        values["rewrite", "compose"] += score_texts(conditions.texts, [case.target for case in cases])
        pictures = {(): draw(model, conditions, noise, schedule="all:0-1")}
        if (left := controls - start) > 0:
            truth = model.replay(requests[:left], [caption(case.target) for case in cases[:left]])
            pictures["controls", "text_only"] = draw(model, conditions, noise, schedule="text:0-1")[:left]
            pictures["controls", "true_target_prompt"] = draw(model, truth, noise, schedule="all:0-1")
        for path, images in pictures.items():
            scores = score_compositions(images, cases[: len(images)])
            values[("multi_reference", *path, "success")] += scores.success
            values[("multi_reference", *path, "preserved")] += scores.preserved
            values[("multi_reference", *path, "found")] += scores.found


def late_subject(values: Values, model: UniFusion, run: Run, num: int) -> None:
    """Canonical captions of three things: whether the last mentioned one is drawn as well as the first."""
    for scenes, _, noise in run.batches(
        "late_subject", lambda rng, _, odd: sample_scene(rng, count=3, held_out=odd), num
    ):
        texts = [caption(scene) for scene in scenes]
        pictures = draw(model, model.replay([Request(text) for text in texts], texts), noise)
        collect(values, ("late_subject", "caption"), score_order(pictures, scenes))


def _make_edit(run: Run) -> Callable[[Random, int, bool], Edit]:
    def make(rng: Random, index: int, odd: bool) -> Edit:
        return sample_edit(rng, OPERATIONS[index % len(OPERATIONS)], split=run.patterns, held_out_pair=odd)

    return make


def share_schedule(share: float) -> str:
    """Image tokens for this share of the steps, rewritten tokens for the rest."""
    if share in (0, 1):
        return "image:0-1" if share else "text:0-1"
    return f"image:0-{share:g}, text:{share:g}-1"


def summarize_shares(report: dict[str, Any]) -> None:
    """Adds to each share the harmonic mean of success and preserved, and which share does best by it."""
    shares = report["share"]
    for scores in shares.values():
        scores["harmonic"] = harmonic(scores["success"], scores["preserved"])
    means = {share: scores["harmonic"]["mean"] for share, scores in shares.items()}
    report["best_share"] = float(max(means, key=means.get))
    report["window_beats_both_ends"] = max(means[f"{share:g}"] for share in WINDOW) > max(means["0"], means["1"])


# From pictures and texts to values.


@dataclass(frozen=True)
class EditScores:
    """Values of edited pictures.

    success: per picture, whether all named attributes are the target's. preserved: per picture, the share of details
    kept by the things that should keep them and were found. found: per such thing, whether anything stands in its
    cell. details: per found thing, by name of the detail.
    """

    success: list[float]
    preserved: list[float]
    found: list[float]
    details: dict[str, list[float]]


def score_scenes(pictures: Sequence[Image.Image], scenes: Sequence[Scene]) -> dict[str, list[float]]:
    """`exact` and the oracle's attribute scores, per picture."""
    values: dict[str, list[float]] = defaultdict(list)
    for picture, scene in zip(pictures, scenes, strict=True):
        reading = read(picture)
        values["exact"].append(exact(reading, scene))
        for name, value in attribute_scores(reading, scene).items():
            values[name].append(value)
    return values


def score_prompts(pictures: Sequence[Image.Image], cases: Sequence[Prompt]) -> list[float]:
    """Whether each picture meets its prompt's constraints."""
    return [case.constraints.accepts(read(picture).scene) for picture, case in zip(pictures, cases, strict=True)]


def score_late_prompts(pictures: Sequence[Image.Image], cases: Sequence[Prompt]) -> dict[str, list[float]]:
    """Per picture, whether it meets the prompt, and whether some thing meets what was mentioned first, and last."""
    values: dict[str, list[float]] = {"exact": [], "first": [], "last": []}
    for picture, case in zip(pictures, cases, strict=True):
        scene, wanted = read(picture).scene, case.constraints.things
        values["exact"].append(case.constraints.accepts(scene))
        values["first"].append(any(map(wanted[0].accepts, scene.things)))
        values["last"].append(any(map(wanted[-1].accepts, scene.things)))
    return values


def score_texts(texts: Sequence[str], scenes: Sequence[Scene]) -> list[float]:
    """Whether each text is the canonical caption of its scene."""
    found = zip(map(parsed, texts), scenes, strict=True)
    return [scene is not None and exact(scene, truth) for scene, truth in found]


def score_order(pictures: Sequence[Image.Image], scenes: Sequence[Scene]) -> dict[str, list[float]]:
    """Per picture, whether shape, colour and size of the first and the last mentioned thing are right at its cell."""
    values: dict[str, list[float]] = {"first": [], "last": []}
    for picture, scene in zip(pictures, scenes, strict=True):
        seen = {thing.attributes for thing in read(picture).scene.things}
        values["first"].append(scene.things[0].attributes in seen)
        values["last"].append(scene.things[-1].attributes in seen)
    return values


def score_edits(pictures: Sequence[Image.Image], cases: Sequence[Edit]) -> EditScores:
    return _score_targets(pictures, [(edit.target, edit.untouched) for edit in cases])


def score_compositions(pictures: Sequence[Image.Image], cases: Sequence[Composition]) -> EditScores:
    return _score_targets(pictures, [(case.target, case.target.things) for case in cases])


def _score_targets(pictures: Sequence[Image.Image], targets: Sequence[tuple[Scene, tuple[Thing, ...]]]) -> EditScores:
    success, preserved, present, details = [], [], [], defaultdict(list)
    for picture, (target, kept) in zip(pictures, targets, strict=True):
        reading = read(picture)
        success.append(exact(reading, target))
        found = things_at(reading)
        present += [thing.cell in found for thing in kept]
        scores = [detail_scores(found[thing.cell], thing) for thing in kept if thing.cell in found]
        if scores:
            preserved.append(fmean(fmean(score.values()) for score in scores))
        for score in scores:
            for name, value in score.items():
                details[name].append(value)
    return EditScores(success, preserved, present, details)


def things_at(reading: Reading) -> dict[tuple[int, int], Thing]:
    return {thing.cell: thing for thing in reading.scene.things}


def parsed(text: str) -> Scene | None:
    """The scene of a canonical caption; None for any other text."""
    try:
        return parse_caption(text)
    except ValueError:
        return None


def collect(values: Values, path: tuple[str, ...], found: dict[str, list[float]]) -> None:
    for name, numbers in found.items():
        values[(*path, name)] += numbers


# Models.


def draw(model: UniFusion, conditions: Conditions, noise: int, **sampling: Any) -> list[Image.Image]:
    return model.decode(model.sample(conditions, seed=noise, **sampling))


def round_trip(model: UniFusion, pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """What the VAE alone makes of pictures: the ceiling."""
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    return model.decode(model.vae.encode(pixels.permute(0, 3, 1, 2).to(model.device).float() / 255))


def _describe(model: UniFusion) -> dict[str, Any]:
    spec = model.spec
    return {"name": spec.name, "vlm": spec.vlm, "steps": spec.steps, "guidance": spec.guidance}
