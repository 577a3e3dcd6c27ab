"""The arms of all claims. Those of the paper's Sec. 2 go without a refiner, which its Sec. 3 adds.

An arm that several claims need is trained once.
"""

from __future__ import annotations

from dataclasses import replace

from ..conditioning.last_layer import LayerSpec
from ..conditioning.per_block import LAPPerBlockSpec, MatchedLayersSpec
from ..presets import ModelSpec
from .arms import Arm, reference
from .data import Mix

SPEC = reference()
WIDTH, DEPTH = SPEC.lap.width, SPEC.dit.depth
EVERY = tuple(range(1, 12))  # of the micro VLM's layers
TEXT_AND_PICTURES: Mix = (("rewrite", 0.6), ("image", 0.4))
EDITS: Mix = (("edit", 0.5), ("rewrite", 0.3), ("image", 0.2))


def _spec(*, refiner: str = "none", **parts) -> ModelSpec:
    return replace(SPEC, refiner_place=refiner, **parts)


def _injected(pooling, injection: str) -> ModelSpec:
    return _spec(lap=pooling, dit=replace(SPEC.dit, injection=injection))


def _layer(number: int, refiner: str = "none") -> ModelSpec:
    """One layer alone."""
    return _spec(layers=(number,), lap=LayerSpec(num_layers=1, width=WIDTH), refiner=refiner)


T5_SPEC = _layer(6)  # the last of our T5

T5 = Arm(name="t5", spec=T5_SPEC, encoder="t5")
LAST = Arm(name="last", spec=_layer(EVERY[-1]))
PENULTIMATE = Arm(name="penultimate", spec=_layer(EVERY[-2]))
KEYS = Arm(
    name="keys", spec=_injected(MatchedLayersSpec(num_layers=len(SPEC.layers), width=WIDTH, slots=DEPTH), "keys")
)
STREAM = Arm(
    name="stream",
    spec=_injected(MatchedLayersSpec(num_layers=len(SPEC.layers), width=WIDTH, slots=DEPTH + 1), "residual"),
)
LAP = Arm(name="lap", spec=_spec())
LAP_EVERY = Arm(name="lap-every", spec=_spec(layers=EVERY, lap=replace(SPEC.lap, num_layers=len(EVERY))))
LAP_PER_BLOCK = Arm(name="lap-per-block", spec=_injected(LAPPerBlockSpec(lap=SPEC.lap, slots=DEPTH + 1), "residual"))
REFINED = Arm(name="lap-refiner", spec=_spec(refiner="after"))
REFINED_BEFORE = Arm(name="refiner-lap", spec=_spec(refiner="before"))
PENULTIMATE_REFINED = Arm(name="penultimate-refiner", spec=_layer(EVERY[-2], refiner="after"))
REWRITTEN = Arm(name="verifi", spec=SPEC, data=(("rewrite", 1.0),))
T5_START = Arm(name="t5-start", spec=T5_SPEC, encoder="t5", share=0.4, fades=False)
FROM_T5 = Arm(name="from-t5", spec=SPEC, start=T5_START, share=0.6)
BASE = Arm(name="base", spec=SPEC, data=TEXT_AND_PICTURES, share=3.0)
BASE_LONGER = Arm(name="base-longer", spec=SPEC, data=TEXT_AND_PICTURES, start=BASE, share=1.2)
EDITED = Arm(name="edit", spec=SPEC, data=EDITS, start=BASE, share=1.2)
