"""The conditioning candidates of the paper behind one door: the spec of one → its module."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..layers import Attention, sdpa
from .lap import LAPSpec, LayerwiseAttentionPooling
from .last_layer import LayerSpec, SingleLayer
from .per_block import LAPPerBlock, LAPPerBlockSpec, MatchedLayers, MatchedLayersSpec

PoolingSpec = LAPSpec | LayerSpec | MatchedLayersSpec | LAPPerBlockSpec
KINDS: dict[str, type] = {
    "lap": LAPSpec,
    "layer": LayerSpec,
    "matched": MatchedLayersSpec,
    "lap-per-block": LAPPerBlockSpec,
}


def build_pooling(spec: PoolingSpec, operations=nn, attention: Attention = sdpa) -> nn.Module:
    """Builds the module of a spec, untrained: states [B, T, L, E] → tokens [B, T, E], or [B, T, slots, E]."""
    if isinstance(spec, LAPSpec):
        return LayerwiseAttentionPooling(spec, operations, attention)
    if isinstance(spec, LAPPerBlockSpec):
        return LAPPerBlock(spec, operations, attention)
    if isinstance(spec, LayerSpec):
        return SingleLayer(spec)
    if isinstance(spec, MatchedLayersSpec):
        return MatchedLayers(spec)
    raise ValueError(f"{type(spec).__name__} is not a conditioning candidate; one of {', '.join(KINDS)}")


def pooling_spec(data: dict[str, Any]) -> PoolingSpec:
    """Reads a spec as `dataclasses.asdict` writes it; files older than the rivals name no kind and hold LAP.

    Raises:
        ValueError: an unknown kind. TypeError: fields missing or unknown.
    """
    kind = data.get("kind", "lap")
    if kind not in KINDS:
        raise ValueError(f"conditioning candidate {kind!r}: one of {', '.join(KINDS)}")
    return KINDS[kind](**data)
