"""Which step an evaluation of the model belongs to, and which entries of a scheduled CONDITIONING speak at it.

Three wrappers, each at core's own place for it: around the sampler (a fresh `Steps`), around each evaluation of the
model (its step), around the batch of conditionings (entries of silent tracks fall out, the others get their weight).
A schedule thereby works with every sampler and every MODEL that carries the wrappers.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import comfy.conds
from comfy.patcher_extension import WrappersMP

from ..unifusion_core.diffusion.schedule import Mix, Schedule, mix_tokens, resolve

KEY = "unifusion"
SCHEDULE, TRACK, GROUP, FADE = "unifusion_schedule", "unifusion_track", "unifusion_group", "unifusion_fade"
STEPS, STEP = "unifusion_steps", "unifusion_step"

# Samplers that evaluate a step's far edge, or beyond it, before the next step begins there: Heun's corrector and its
# kin. tests/comfy holds both sets against every sampler of core.
LOOK_AHEAD = frozenset(
    f"sample_{name}"
    for name in (
        "heun",
        "heunpp2",
        "exp_heun_2_x0",
        "exp_heun_2_x0_sde",
        "dpm_2_ancestral",
        "dpmpp_2s_ancestral_cfg_pp",
    )
)
OWN_STEPS = frozenset({"sample_dpm_fast", "sample_dpm_adaptive"})  # they take the range, not the edges


class Steps:
    """Tells the step of each evaluation from its sigma and from the sampler's callbacks.

    A sampler calls back once a step, after its first evaluation. Until the next call, whatever lies above the next
    edge is an inner evaluation of that step; on the edge itself the next step begins, unless the sampler looks ahead.
    One that takes steps of its own is told by sigma alone.
    """

    def __init__(self, sigmas: list[float], sampler: str = "") -> None:
        self.sigmas = sigmas
        self.looks_ahead, self.own_steps = sampler in LOOK_AHEAD, sampler in OWN_STEPS
        self.called: int | None = None
        self.looked = False

    def callback(self, step: int) -> None:
        self.called, self.looked = step, False

    def find(self, sigma: float) -> int:
        last = len(self.sigmas) - 2
        if self.called is None or self.called >= last or self.own_steps:
            return self._by_sigma(sigma)
        edge = self.sigmas[self.called + 1]
        on_edge = abs(sigma - edge) <= edge * 1e-5
        if sigma > edge and not on_edge:
            return self.called
        if self.looks_ahead and not (on_edge and self.looked):
            self.looked = True
            return self.called
        return self.called + 1 if on_edge else self._by_sigma(sigma)

    def _by_sigma(self, sigma: float) -> int:
        begun = sum(sigma <= edge * (1 + 1e-5) for edge in self.sigmas[:-1])
        return max(0, begun - 1)


def attach(patcher) -> None:
    """Puts the wrappers on a MODEL, once."""
    for place, wrapper in (
        (WrappersMP.SAMPLER_SAMPLE, _around_sampler),
        (WrappersMP.PREDICT_NOISE, _around_evaluation),
        (WrappersMP.CALC_COND_BATCH, _around_batch),
    ):
        patcher.remove_wrappers_with_key(place, KEY)
        patcher.add_wrapper_with_key(place, KEY, wrapper)


def _around_sampler(execute, guider, sigmas, extra_args, callback, *rest, **kwargs):
    name = getattr(getattr(execute.class_obj, "sampler_function", None), "__name__", "")
    steps = Steps([float(sigma) for sigma in sigmas], name)
    extra_args["model_options"].setdefault("transformer_options", {})[STEPS] = steps

    def listening(step, *args, **kwargs):
        steps.callback(step)
        if callback is not None:
            callback(step, *args, **kwargs)

    return execute(guider, sigmas, extra_args, listening, *rest, **kwargs)


def _around_evaluation(execute, x, timestep, model_options=None, seed=None):
    options = dict((model_options or {}).get("transformer_options", {}))
    if STEPS in options:
        options[STEP] = options[STEPS].find(float(timestep.max()))
        model_options = {**model_options, "transformer_options": options}
    return execute(x, timestep, model_options or {}, seed)


def _around_batch(execute, model, conds, x_in, timestep, model_options):
    options = model_options.get("transformer_options", {})
    if STEP in options:
        conds = [None if entries is None else _speaking(entries, options, model) for entries in conds]
    return execute(model, conds, x_in, timestep, model_options)


def _speaking(entries: list[dict], options: dict[str, Any], model) -> list[dict]:
    """The entries that speak at this step, with their weights."""
    kept = [entry for entry in entries if SCHEDULE not in entry]
    groups: dict[str, dict[str, list[dict]]] = {}  # a track has several entries where Combine doubled its schedule
    for entry in entries:
        if SCHEDULE in entry:
            groups.setdefault(entry[GROUP], {}).setdefault(entry[TRACK], []).append(entry)
    for tracks in groups.values():
        first = next(iter(tracks.values()))[0]
        mix = _mix(first[SCHEDULE], options, model)
        if first[FADE] == "tokens" and len(mix) > 1:
            kept += [_interpolated(pair, mix) for pair in zip(*(tracks[track] for track, _ in mix), strict=True)]
        else:
            kept += [_weighted(entry, weight) for track, weight in mix for entry in tracks[track]]
    return kept


def _mix(schedule: Schedule, options: dict[str, Any], model) -> Mix:
    sigmas = options[STEPS].sigmas
    most = max(1.0, float(model.model_sampling.sigma_max))  # flow runs from 1; older families from about 14
    return _resolved(schedule, tuple(min(1.0, sigma / most) for sigma in sigmas))[options[STEP]]


@lru_cache(maxsize=64)
def _resolved(schedule: Schedule, sigmas: tuple[float, ...]) -> list[Mix]:
    return resolve(schedule, len(sigmas) - 1, sigmas)


def _weighted(entry: dict, weight: float) -> dict:
    return entry if weight == 1 else {**entry, "strength": entry.get("strength", 1.0) * weight}


def _interpolated(pair: tuple[dict, ...], mix: Mix) -> dict:
    """One entry whose tokens lie between those of the two tracks; the schedule node has seen to equal lengths."""
    first = pair[0]
    tokens = mix_tokens(mix, {entry[TRACK]: entry["model_conds"]["c_crossattn"].cond for entry in pair})
    return {**first, "model_conds": {**first["model_conds"], "c_crossattn": comfy.conds.CONDRegular(tokens)}}
