"""What the layers of the VLM hold, which of them LAP weighs, and what pictures lose without some of them."""

from __future__ import annotations

from random import Random
from statistics import fmean

import torch
import torch.nn.functional as F

from ..conditioning.vlm import Request
from ..evaluation.layers import by_kind, dropout_effect, layer_weights
from ..evaluation.micro import draw, score_scenes
from ..microworld.prompts import Prompt
from ..microworld.render import render
from ..microworld.scene import Scene
from ..pipeline import UniFusion
from .data import described
from .measured import Measured, following, held_out

KINDS = ("all", "image", "instruction")


def similarity(model: UniFusion, seed: int, num: int) -> Measured:
    """Cosine between a token's states in two layers of the VLM; a value for every twenty cases.

    `adjacent`, `apart` (three layers) and `ends` (first against last layer) over all tokens; under `pair.<i>` layers i
    and i + 1; under `image.` and `instruction.` the same over those tokens.
    """
    found = Measured()
    last = model.vlm.num_layers
    vlm = model.vlm.tapping(range(last + 1))  # so that a layer's place is its number; 0, the embeddings, is left out
    for cases, _ in held_out("similarity", _described, seed, num):
        hidden = vlm.encode([Request(case.text, (render(case.scene),)) for case in cases])
        cosines = {
            (one, other): by_kind(
                F.cosine_similarity(hidden.states[:, :, one].float(), hidden.states[:, :, other].float(), dim=-1),
                hidden.mask,
                hidden.spans,
            )
            for one, other in _pairs(last)
        }
        for kind in KINDS:
            prefix = "" if kind == "all" else f"{kind}."
            values = {pair: float(cosine[kind]) for pair, cosine in cosines.items()}
            near = {one: value for (one, other), value in values.items() if other == one + 1}
            apart = [value for (one, other), value in values.items() if other == one + 3]
            found.add({"adjacent": [fmean(near.values())], "apart": [fmean(apart)], "ends": [values[1, last]]}, prefix)
            found.add({f"pair.{one}": [value] for one, value in near.items()}, prefix)
    return found


def pooling_weights(model: UniFusion, seed: int, num: int) -> Measured:
    """LAP's final linear: the `share` of each tapped layer, and `uniformity`: of how many layers' weight the shares
    are worth (the exponential of their entropy), over the number of layers; 1 where all weigh the same.

    Nothing is drawn, so that seed and num are not asked for.
    """
    found = Measured()
    share = layer_weights(model.lap).share
    entropy = -(share * share.clamp_min(1e-12).log()).sum()
    found.add({"uniformity": [float(entropy.exp()) / len(share)], "largest": [float(share.max()) * len(share)]})
    found.add({f"share.{layer}": [float(value)] for layer, value in zip(model.spec.layers, share, strict=True)})
    return found


def dropout(model: UniFusion, seed: int, num: int) -> Measured:
    """Prompts drawn with the pooling weight of some layers at zero.

    `kept` is what follows the prompt with all layers; `lost.first`, `lost.middle` and `lost.last` how much less does
    without those (`parts`), in each picture. `moves.<layer>`: how far a pooled token moves without it.
    """
    found = Measured()
    for cases, noise in held_out("dropout", _described, seed, num):
        hidden = model.vlm.encode([Request(case.text) for case in cases])
        scenes = [case.scene for case in cases]
        kept = _drawn(found, model, hidden, noise, scenes, ())
        found.add({"kept": kept})
        for part, groups in parts(len(model.spec.layers)).items():
            losses = []
            for group in groups:
                left = _drawn(found, model, hidden, noise, scenes, group)
                losses.append([a - b for a, b in zip(kept, left, strict=True)])
            found.add({f"lost.{part}": [fmean(each) for each in zip(*losses, strict=True)]})
        words = hidden.select("instruction")
        moves = dropout_effect(model.lap, words.states, words.mask)["all"]
        found.add({f"moves.{layer}": [float(move)] for layer, move in zip(model.spec.layers, moves, strict=True)})
        found.entitle([case.text for case in cases])
    return found


def parts(num_layers: int) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Which positions are dropped together as the first, middle and last layers: one at a time of up to six, else a
    quarter of them in a row. What is averaged over stands side by side."""
    if num_layers <= 6:
        middle = tuple((place,) for place in range(1, num_layers - 1))
        return {"first": ((0,),), "middle": middle, "last": ((num_layers - 1,),)}
    size = round(num_layers / 4)
    start = (num_layers - size) // 2
    places = {"first": 0, "middle": start, "last": num_layers - size}
    return {part: (tuple(range(at, at + size)),) for part, at in places.items()}


@torch.no_grad()
def _drawn(found: Measured, model: UniFusion, hidden, noise: int, scenes: list[Scene], dropped: tuple[int, ...]):
    """How far each picture follows its prompt."""
    condition = model.refine(model.pool(hidden, dropped).select("instruction"))
    pictures = draw(model, {"text": condition}, noise)
    names = ", ".join(str(model.spec.layers[place]) for place in dropped)
    found.show(f"without {names}" if dropped else "all layers", pictures)
    return following(score_scenes(pictures, scenes))["following"]


def _pairs(last: int) -> list[tuple[int, int]]:
    return [*((one, one + step) for step in (1, 3) for one in range(1, last + 1 - step)), (1, last)]


def _described(rng: Random, _: int, odd: bool) -> Prompt:
    return described(rng, split="held_out", held_out_pair=odd)
