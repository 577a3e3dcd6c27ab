"""Pictures in, pictures out: what of a picture reaches the drawn one, and what of an instruction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from statistics import fmean

from ..conditioning.vlm import Request
from ..evaluation.micro import MAX_NEW_TOKENS, EditScores, draw, score_compositions, score_edits, score_scenes
from ..evaluation.micro import share_schedule as schedule_of
from ..evaluation.reconstruction import score_pictures
from ..microworld.edits import OPERATIONS, Composition, Edit, sample_composition, sample_edit
from ..microworld.render import render
from ..microworld.scene import Scene, sample_scene
from ..pipeline import UniFusion
from .measured import Measured, following, held_out

SHARES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 1.0)  # of the steps that see image tokens, the first ones
GRIDS = {1: (1, 1), 4: (2, 2), 9: (3, 3)}  # of tiles; beyond one a thumbnail stands beside them
CANVASES = {192: 6, 128: 4}  # px of a side, and cells along it
PROMPT = "describe the image"  # stands behind the image tokens, which cannot see it
TILED_BATCH = 10


def image_to_image(model: UniFusion, seed: int, num: int) -> Measured:
    """Pictures drawn from their image tokens alone.

    `following` and each attribute against the source; under `chance.` the same against the next source in turn; under
    `placeless.` without the tokens' positions, which an arm trained on text has never met.
    """
    found = Measured()
    for scenes, noise in held_out("image_to_image", _scene, seed, num):
        sources = [render(scene) for scene in scenes]
        track = _image_track(model, sources)
        drawn = draw(model, {"image": track}, noise)
        bare = draw(model, {"image": replace(track, positions=None)}, noise)
        found.add(following(score_scenes(drawn, scenes)))
        found.add(following(score_scenes(drawn, [*scenes[1:], scenes[0]])), "chance.")
        found.add(following(score_scenes(bare, scenes)), "placeless.")
        for label, pictures in (("source", sources), ("", drawn), ("without positions", bare)):
            found.show(label, pictures)
    return found


def edits_by_share(model: UniFusion, seed: int, num: int) -> Measured:
    """Edits by a schedule: image tokens for the first share of the steps, the rewrite's tokens for the others.

    For each share `success` (all named attributes are the target's), `preserved` (unnamed details of untouched things)
    and their `harmonic` mean; `best`, the share that does best by it, and `window`, the mean of those in 10-20 %.
    """
    found = Measured()
    for cases, noise in held_out("zero_shot_edit", _edit, seed, num):
        sources = [render(edit.source) for edit in cases]
        requests = [Request(edit.instruction, (source,)) for edit, source in zip(cases, sources, strict=True)]
        conditions = model.prepare(requests, max_new_tokens=MAX_NEW_TOKENS)
        found.entitle([edit.instruction for edit in cases])
        found.show("source", sources)
        for share in SHARES:
            pictures = draw(model, conditions, noise, schedule=schedule_of(share))
            _add(found, score_edits(pictures, cases), f"{share:g}.")
            found.show(f"{share:.0%}", pictures)
    means = {share: _harmonic(found, f"{share:g}.") for share in SHARES}
    found.add({f"{share:g}.harmonic": [mean] for share, mean in means.items()})
    window = [mean for share, mean in means.items() if 0.1 <= share <= 0.2]
    found.add({"best": [max(means, key=means.get)], "window": [fmean(window)]})
    return found


def compositions(model: UniFusion, seed: int, num: int) -> Measured:
    """One thing of each of two pictures: `success`, `preserved` and their `harmonic` mean with all tokens.

    Under `words.` the same with the rewrite's tokens alone.
    """
    found = Measured()
    for cases, noise in held_out("multi_reference", _composition, seed, num):
        pictures = [tuple(render(scene) for scene in case.references) for case in cases]
        requests = [Request(case.instruction, pair) for case, pair in zip(cases, pictures, strict=True)]
        conditions = model.prepare(requests, max_new_tokens=MAX_NEW_TOKENS)
        found.entitle([case.instruction for case in cases])
        found.show("image one", [one for one, _ in pictures])
        found.show("image two", [two for _, two in pictures])
        for label, prefix, schedule in (("", "", "all:0-1"), ("words alone", "words.", "text:0-1")):
            drawn = draw(model, conditions, noise, schedule=schedule)
            _add(found, score_compositions(drawn, cases), prefix)
            found.show(label, drawn)
    for prefix in ("", "words."):
        found.add({f"{prefix}harmonic": [_harmonic(found, prefix)]})
    return found


def edits(model: UniFusion, seed: int, num: int) -> Measured:
    """Edits with all tokens: `success`, and apart for instructions that name things and those that refer by facts."""
    found = Measured()
    for cases, noise in held_out("edit", _edit, seed, num):
        sources = [render(edit.source) for edit in cases]
        requests = [Request(edit.instruction, (source,)) for edit, source in zip(cases, sources, strict=True)]
        drawn = draw(model, model.prepare(requests, max_new_tokens=MAX_NEW_TOKENS), noise, schedule="all:0-1")
        scores = score_edits(drawn, cases)
        _add(found, scores, "")
        for edit, success in zip(cases, scores.success, strict=True):
            found.add({"indirect" if edit.indirect else "direct": [success]})
        found.entitle([edit.instruction for edit in cases])
        found.show("source", sources)
        found.show("", drawn)
    return found


def tiles(model: UniFusion, seed: int, num: int) -> Measured:
    """Pictures again from their image tokens alone, without guidance: `<px>.<tiles>.psnr` in dB, `ssim`, `marks`.

    A tenth as many pictures, but two at least: they are large.
    """
    found, num = Measured(), max(2, num // 10)
    for size, cells in CANVASES.items():
        rng = Random(f"tiles-{size}-{seed}")
        few, many = cells**2 // 5, cells**2 * 5 // 8
        scenes = [sample_scene(rng, rows=cells, columns=cells, count=rng.randint(few, many)) for _ in range(num)]
        for start in range(0, num, TILED_BATCH):
            part = scenes[start : start + TILED_BATCH]
            truths = [render(scene) for scene in part]
            found.show(f"{size} px", truths)
            for count, grid in GRIDS.items():
                track = _image_track(model, truths, grid)
                drawn = draw(model, {"image": track}, seed + start, size=truths[0].size, guidance=1.0)
                scores = score_pictures(drawn, truths, part)
                found.add({name: scores[name] for name in ("psnr", "ssim", "marks")}, f"{size}.{count}.")
                found.show(f"{size} px, {count} {'tile' if count == 1 else 'tiles'}", drawn)
    return found


def _image_track(model: UniFusion, pictures: Sequence, grid: tuple[int, int] | None = None):
    requests = [Request(PROMPT, (picture,), grid=grid) for picture in pictures]
    return model.conditions(model.vlm.encode(requests)).tracks["image"]


def _add(found: Measured, scores: EditScores, prefix: str) -> None:
    found.add({"success": scores.success, "preserved": scores.preserved, "found": scores.found}, prefix)


def _harmonic(found: Measured, prefix: str) -> float:
    """Of success and preserved; 0 where nothing was found that could be preserved."""
    success = found.mean(f"{prefix}success")
    preserved = found.mean(f"{prefix}preserved") if found.values[f"{prefix}preserved"] else 0.0
    return 2 * success * preserved / (success + preserved) if success + preserved else 0.0


def _scene(rng: Random, _: int, odd: bool) -> Scene:
    return sample_scene(rng, held_out=odd)


def _edit(rng: Random, index: int, odd: bool) -> Edit:
    return sample_edit(rng, OPERATIONS[index % len(OPERATIONS)], split="held_out", held_out_pair=odd)


def _composition(rng: Random, _: int, odd: bool) -> Composition:
    return sample_composition(rng, split="held_out", held_out_pair=odd)
