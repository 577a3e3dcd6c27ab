"""Limits of inputs, held where core does not: it checks what is typed into a node, not what comes in over a link."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

from comfy_api.latest import io

from ..unifusion_core.conditioning.hidden_states import HiddenStates
from .memory import ManagedAdapter, ManagedFusion, ManagedVLM

OURS = {
    "UNIFUSION_VLM": (ManagedVLM, "UniFusion Load VLM"),
    "UNIFUSION_FUSION": (ManagedFusion, "UniFusion Load Model"),
    "UNIFUSION_ADAPTER": (ManagedAdapter, "UniFusion Load Adapter"),
    "UNIFUSION_HIDDEN": (HiddenStates, "UniFusion Rewrite"),
}


def within_limits(execute: Callable) -> Callable:
    """Wraps a node's execute: every input it is given must be what the node's schema says.

    Raises (the wrapped one):
        ValueError: a number outside its range or not finite, an unknown option, another kind of value.
    """

    @wraps(execute)
    def checked(cls, **given):
        for declared in cls.define_schema().inputs:
            _check(declared, given.get(declared.id), declared.id in given)
        return execute(cls, **given)

    return checked


def _check(declared: Any, value: Any, given: bool) -> None:
    name = declared.id
    if isinstance(declared, io.DynamicCombo.Input):
        chosen = value.get(name) if isinstance(value, dict) else value
        options = {option.key: option.inputs for option in declared.options}
        if chosen not in options:
            raise ValueError(f"{name} is {_short(chosen)}; one of {', '.join(options)} is accepted")
        for inner in options[chosen]:
            _check(inner, value.get(inner.id), inner.id in value)
    elif value is None and (not given or declared.optional):
        return
    elif isinstance(declared, (io.Int.Input, io.Float.Input)):
        _check_number(declared, value)
    elif isinstance(declared, io.Combo.Input):
        options = list(declared.options)
        if value not in options:
            listed = ", ".join(map(str, options[:12])) or "nothing yet"
            raise ValueError(f"{name} is {_short(value)}; one of {listed} is accepted")
    elif isinstance(declared, io.Boolean.Input):
        if not isinstance(value, bool):
            raise ValueError(f"{name} is {_short(value)}; true or false is accepted")
    elif isinstance(declared, io.String.Input):
        if not isinstance(value, str):
            raise ValueError(f"{name} is {_short(value)}; a text is accepted")
    elif declared.get_io_type() in OURS:
        kind, source = OURS[declared.get_io_type()]
        if not isinstance(value, kind):
            raise ValueError(f"{name} is {type(value).__name__}; connect {source}")


def _check_number(declared: Any, value: Any) -> None:
    whole = isinstance(declared, io.Int.Input)
    fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not fits or not math.isfinite(value) or not declared.min <= value <= declared.max:
        kind = "whole number" if whole else "number"
        raise ValueError(
            f"{declared.id} is {_short(value)}; a {kind} from {declared.min} to {declared.max} is accepted"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
