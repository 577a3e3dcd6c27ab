"""Step-exact schedules through core's samplers, against core's ranges and against unifusion_core's own sampling."""

import os
import sys

sys.path.insert(0, os.path.dirname(__file__))
EDIT = "paint the heart green"


def main(pack) -> dict:
    import torch
    from common import Setting, worst

    setting = Setting(pack, "micro-base (embedded, stage 1)", EDIT)
    run, sample = pack.run, setting.sample
    two = "image:0-0.15, text:0.15-1"
    scheduled = setting.schedule(two, a=setting.pooled)
    by_ranges = with_range(setting.image, 0, 2.5 / 20) + with_range(setting.text, 2.5 / 20, 1)
    (exported,) = run("UniFusionScheduleToRanges", conditioning=scheduled, steps=20)
    base = sample(scheduled, steps=20)
    facts = {
        "equals core's ranges": worst(base, sample(by_ranges, steps=20)),
        "equals its export": worst(base, sample(exported, steps=20)),
        "equals two connected tracks": worst(
            base, sample(setting.schedule("a:0-0.15, b:0.15-1", a=setting.image, b=setting.text), steps=20)
        ),
        "differs from text alone": worst(base, sample(setting.text, steps=20)),
    }
    facts |= against_core(setting, pack)
    facts["forwards"] = {
        name: forwards(setting, setting.schedule(text, a=setting.image, b=setting.text), **options)
        for name, text, options in (
            ("pure", "a:0-0.5, b:0.5-1", {"steps": 4}),
            ("fade", "a:0-0.25 > b:0.75-1", {"steps": 4}),
            ("part", "a:0-0.5, b:0.5-1", {"steps": 4, "denoise": 0.5}),
        )
    }
    facts["steps of image"] = {
        f"{sampler} {scheduler} {steps}": image_steps(setting, scheduled, sampler, scheduler, steps)
        for sampler, scheduler, steps in (
            ("euler", "simple", 20),
            ("euler", "karras", 20),
            ("heun", "beta", 20),
            ("dpmpp_2m_sde", "linear_quadratic", 20),
            ("dpm_2", "normal", 10),
            ("euler", "simple", 4),
            ("euler", "simple", 7),
        )
    }
    same = setting.schedule("a:0-0.5 > b:1-1", fade="tokens", a=setting.image, b=setting.image)
    facts["a fade of equal tokens is that token"] = worst(sample(same), sample(setting.image))
    facts["forwards"]["fade of tokens"] = forwards(setting, same, steps=4)
    left, right = torch.zeros(1, 64, 64), torch.ones(1, 64, 64)
    left[..., :32], right[..., :32] = 1, 0
    halves = [mask(run, scheduled, half) for half in (left, right)]
    facts["two masked halves of one schedule"] = worst(
        sample(run("ConditioningCombine", conditioning_1=halves[0], conditioning_2=halves[1])[0], steps=20), base
    )
    foreign = setting.model.clone()
    for place in ("sampler_sample", "predict_noise", "calc_cond_batch"):
        foreign.remove_wrappers_with_key(place, "unifusion")
    (wrapped,) = run("UniFusionScheduleModel", model=foreign)
    facts["a wrapped foreign model follows"] = worst(sample(scheduled, wrapped, steps=20), base)
    facts["an unwrapped one does not"] = worst(sample(scheduled, foreign, steps=20), base)
    with torch.inference_mode():
        first = pack.core.KSamplerAdvanced().sample(
            setting.model,
            "enable",
            3,
            20,
            2.5,
            "euler",
            "simple",
            scheduled,
            setting.negative,
            setting.latent,
            0,
            20,
            "disable",
        )[0]["samples"]
    facts["KSamplerAdvanced over all steps"] = worst(first, base)
    facts["advanced"] = image_steps_advanced(setting, scheduled)
    return facts


def against_core(setting, pack) -> dict:
    import numpy as np
    from common import worst
    from PIL import Image

    pipeline, vlm = pack.module("unifusion_core.pipeline"), pack.module("unifusion_core.conditioning.vlm")
    model = pipeline.load_model("micro-base")
    picture = Image.fromarray((setting.picture[0].numpy() * 255).round().astype(np.uint8))
    conditions = model.prepare([vlm.Request(EDIT, images=(picture,))], max_new_tokens=64)
    tracks = {"a": conditions.tracks["image"], "b": conditions.tracks["text"]}
    out = {}
    for name, text, sampler in (
        ("switch", "a:0-0.25, b:0.25-1", "euler"),
        ("fade", "a:0-0.2 > b:0.7-1", "euler"),
        ("fade by heun", "a:0-0.2 > b:0.7-1", "heun"),
        ("sigma", "a:0-0.3@sigma, b:0.3-1@sigma", "euler"),
    ):
        ours = setting.sample(setting.schedule(text, a=setting.image, b=setting.text), steps=8, sampler=sampler)
        theirs = model.sample(tracks, schedule=text, steps=8, guidance=2.5, seed=3, sampler=sampler)
        out[f"core: {name}"] = worst(ours, theirs)
    return out


def mask(run, conditioning, area):
    inputs = {"conditioning": conditioning, "mask": area, "strength": 1.0, "set_cond_area": "default"}
    return run("ConditioningSetMask", **inputs)[0]


def with_range(conditioning, start, end):
    return [[tensor, {**words, "start_percent": start, "end_percent": end}] for tensor, words in conditioning]


def forwards(setting, positive, **options) -> int:
    """Forwards of the DiT under the positive alone."""
    count, model = [], setting.model.clone()

    def wrapper(execute, *args, **kwargs):
        count.append(args[0].shape[0])
        return execute(*args, **kwargs)

    model.add_wrapper_with_key("diffusion_model", "count", wrapper)
    setting.sample(positive, model, cfg=1.0, **options)
    return len(count)


def image_steps(setting, positive, sampler, scheduler, steps) -> list:
    """[steps at which the image's tokens were given, steps in all]."""
    seen, model = {}, setting.model.clone()
    tokens = setting.image[0][0].shape[1]

    def batch(execute, model_, conds, x, timestep, options):
        step = options["transformer_options"]["unifusion_step"]
        lengths = {entry["model_conds"]["c_crossattn"].cond.shape[1] for entry in conds[0]}
        seen.setdefault(step, set()).update(lengths)
        return execute(model_, conds, x, timestep, options)

    # Behind ours, so that it sees what is left.
    model.wrappers["calc_cond_batch"] = {**model.wrappers["calc_cond_batch"], "log": [batch]}
    setting.sample(positive, model, steps=steps, sampler=sampler, scheduler=scheduler, cfg=1.0)
    return [sum(tokens in lengths for lengths in seen.values()), len(seen), max(map(len, seen.values()))]


def image_steps_advanced(setting, positive) -> list:
    """The same for steps 4 to 14 of 20: the share counts the steps that are run."""
    sample = setting.sample

    def advanced(positive, model, steps, sampler, scheduler, cfg):
        import torch

        with torch.inference_mode():
            setting.pack.core.KSamplerAdvanced().sample(
                model,
                "enable",
                3,
                20,
                cfg,
                sampler,
                scheduler,
                positive,
                setting.negative,
                setting.latent,
                4,
                14,
                "enable",
            )

    setting.sample = advanced
    found = image_steps(setting, positive, "euler", "simple", 20)
    setting.sample = sample
    return found
