"""Every core sampler × four schedulers: finite latents, and the step that each evaluation is said to belong to."""

import os
import sys

sys.path.insert(0, os.path.dirname(__file__))


def main(pack, steps: int) -> dict:
    import comfy.sample
    import comfy.samplers
    import torch
    from common import Setting

    setting = Setting(pack)
    stepping = pack.module("nodes.stepping")
    own = {name.removeprefix("sample_") for name in stepping.OWN_STEPS}
    wrong, broken, runs = [], [], 0
    for sampler in comfy.samplers.SAMPLER_NAMES:
        for scheduler in ("simple", "normal", "beta", "linear_quadratic"):
            log, model = [], setting.model.clone()
            model.add_wrapper_with_key("calc_cond_batch", "log", listen(log))
            with torch.inference_mode():
                out = comfy.sample.sample_custom(
                    model,
                    comfy.sample.prepare_noise(setting.latent["samples"], 1),
                    1.0,
                    comfy.samplers.sampler_object(sampler),
                    comfy.samplers.KSampler(model, steps, "cpu", sampler, scheduler, 1.0).sigmas,
                    setting.negative,
                    setting.negative,
                    setting.latent["samples"],
                    callback=lambda step, *_, log=log: log.append(("began", step)),
                    disable_pbar=True,
                    seed=1,
                )
            runs += 1
            if not torch.isfinite(out).all():
                broken.append([sampler, scheduler])
            said = [entry[1] for entry in log if entry[0] == "said"]
            if sampler not in own and said != truth(log):
                wrong.append([sampler, scheduler, said, truth(log)])
    return {"runs": runs, "broken": broken, "wrong": wrong, "samplers": len(comfy.samplers.SAMPLER_NAMES)}


def listen(log):
    def wrapper(execute, model, conds, x, timestep, options):
        log.append(("said", options["transformer_options"]["unifusion_step"]))
        return execute(model, conds, x, timestep, options)

    return wrapper


def truth(log) -> list[int]:
    """The evaluation just before a callback begins that step; those until the next belong to it."""
    steps, step = [], 0
    for entry, after in zip(log, [*log[1:], None], strict=True):
        if entry[0] == "said":
            step = after[1] if after is not None and after[0] == "began" else step
            steps.append(step)
    return steps
