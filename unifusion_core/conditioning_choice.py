"""LAP and its rivals in the paper by the names that recipes use: how a model is conditioned, and changing that.

Layers are numbered as `FrozenVLM.layers`: i = residual stream after i layers of the VLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

from .conditioning.lap import LAPSpec
from .conditioning.last_layer import LayerSpec
from .conditioning.per_block import LAPPerBlockSpec, MatchedLayersSpec
from .conditioning.pooling import PoolingSpec
from .conditioning.refiner import RefinerSpec
from .presets import ModelSpec, RefinerPlace

Conditioning = Literal["lap", "last", "penultimate", "keys", "injection", "lap-per-block"]
Layers = Literal["every", "third"] | Sequence[int]
ALONE = {"last": 0, "penultimate": 1}  # how far before the VLM's last layer
INJECTIONS = {"keys": "keys", "injection": "residual", "lap-per-block": "residual"}
WAYS = {"input": "", "keys": ", as keys and values of every block", "residual": ", added behind every block"}


def with_conditioning(
    spec: ModelSpec,
    conditioning: Conditioning = "lap",
    *,
    refiner: RefinerPlace | None = None,
    layers: Layers | None = None,
    num_layers: int | None = None,
) -> ModelSpec:
    """The same DiT, conditioned in another way (the paper's Sec. 2, 3 and App. A.1).

    Args:
        refiner: None = as it was where the way stays the same; else after LAP, and none beside a rival, as in Sec. 2.
        layers: what is pooled: "every" layer, every "third", or numbers; None = the spec's, where it has several.
        num_layers: of the VLM; needed for "last", "penultimate", "every" and "third".
    Raises:
        ValueError: an unknown way, place or layer; layers for a way that reads one; or no num_layers where needed.
    """
    if conditioning not in get_args(Conditioning):
        raise ValueError(f"conditioning {conditioning!r}: expected one of {', '.join(get_args(Conditioning))}")
    tapped = _layers(spec, conditioning, layers, num_layers)
    dit = replace(spec.dit, injection=INJECTIONS.get(conditioning, "input"))
    pooling = _pooling(spec, conditioning, len(tapped), dit.slots)
    if refiner is None:
        stays = type(pooling) is type(spec.lap) and dit.injection == spec.dit.injection
        refiner = spec.refiner_place if stays else "after" if conditioning == "lap" else "none"
    return replace(spec, layers=tapped, lap=pooling, dit=dit, refiner_place=refiner)


def for_width(spec: ModelSpec, width: int) -> ModelSpec:
    """The same model behind an encoder of another width; LAP and refiner keep the size of a head where it divides."""
    if width == spec.lap.width:
        return spec
    lap = spec.lap
    if isinstance(lap, LAPSpec):
        lap = _resized(lap, width)
    elif isinstance(lap, LAPPerBlockSpec):
        lap = replace(lap, lap=_resized(lap.lap, width))
    else:
        lap = replace(lap, width=width)
    return replace(spec, lap=lap, refiner=_resized(spec.refiner, width), dit=replace(spec.dit, condition_width=width))


def conditioning_of(spec: ModelSpec, num_layers: int) -> Conditioning | None:
    """By which name a spec is conditioned; None = by none, as by one layer in the middle."""
    for name in get_args(Conditioning):
        asked = {} if name in ALONE else {"layers": spec.layers}
        if with_conditioning(spec, name, refiner=spec.refiner_place, num_layers=num_layers, **asked) == spec:
            return name
    return None


def describe(spec: ModelSpec) -> str:
    """How a model is conditioned, such as "LAP over layers 2, 5, 8, 11, refiner after"."""
    numbers = ", ".join(map(str, spec.layers))
    ways = {
        LAPSpec: f"LAP over layers {numbers}",
        LAPPerBlockSpec: f"a LAP for every block over layers {numbers}",
        MatchedLayersSpec: f"layers {numbers}",
    }
    alone = isinstance(spec.lap, LayerSpec)
    what = f"layer {spec.layers[spec.lap.index]} alone" if alone else ways[type(spec.lap)]
    place = "no refiner" if spec.refiner_place == "none" else f"refiner {spec.refiner_place}"
    return f"{what}{WAYS[spec.dit.injection]}, {place}"


def _layers(spec: ModelSpec, conditioning: str, layers: Layers | None, num_layers: int | None) -> tuple[int, ...]:
    def known(what: str) -> int:
        if num_layers is None:
            raise ValueError(f"{what} needs the VLM's number of layers; give num_layers")
        return num_layers

    if conditioning in ALONE:
        if layers is not None:
            raise ValueError(f"layers {layers!r}: conditioning {conditioning!r} reads that one layer; leave them out")
        number = known(f"conditioning {conditioning!r}") - ALONE[conditioning]
        if number < 1:
            raise ValueError(f"conditioning {conditioning!r}: the VLM has {num_layers} layers, too few for that")
        return (number,)
    if layers is None and spec.lap.num_layers > 1:
        return spec.layers
    if layers is None or layers == "third":
        return tuple(range(2, known("every third layer") + 1, 3))
    if layers == "every":
        return tuple(range(1, known("every layer") + 1))
    chosen = () if isinstance(layers, str) else tuple(layers)
    most = max(chosen, default=0) if num_layers is None else num_layers
    if not chosen or list(chosen) != sorted(set(chosen)) or chosen[0] < 0 or chosen[-1] > most:
        limit = "" if num_layers is None else f" to {num_layers}"
        raise ValueError(f"layers {layers!r}: expected every, third, or rising numbers from 0{limit}")
    return chosen


def _pooling(spec: ModelSpec, conditioning: str, num_layers: int, slots: int) -> PoolingSpec:
    width = spec.lap.width
    if conditioning in ALONE:
        return LayerSpec(num_layers=1, width=width)
    if conditioning == "lap":
        return _lap(spec, num_layers)
    if conditioning == "lap-per-block":
        return LAPPerBlockSpec(lap=_lap(spec, num_layers), slots=slots)
    return MatchedLayersSpec(num_layers=num_layers, width=width, slots=slots)


def _lap(spec: ModelSpec, num_layers: int) -> LAPSpec:
    """The spec's own LAP over so many layers; where it has none, one of the refiner's sizes, as in the presets."""
    own = spec.lap.lap if isinstance(spec.lap, LAPPerBlockSpec) else spec.lap
    if isinstance(own, LAPSpec):
        return replace(own, num_layers=num_layers)
    like = spec.refiner
    return LAPSpec(
        num_layers=num_layers,
        width=like.width,
        num_heads=like.num_heads,
        num_kv_heads=like.num_kv_heads,
        intermediate_size=like.intermediate_size,
        eps=like.eps,
    )


def _resized(part: LAPSpec | RefinerSpec, width: int) -> LAPSpec | RefinerSpec:
    heads = max(1, width * part.num_heads // part.width)
    while width % heads:
        heads -= 1
    size = round(part.intermediate_size * width / part.width)
    return replace(part, width=width, num_heads=heads, num_kv_heads=None, intermediate_size=size)
