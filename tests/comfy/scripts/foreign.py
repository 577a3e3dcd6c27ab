"""A schedule on core's own Krea 2, small and random, behind UniFusion Schedule for any Model."""

import os
import sys

sys.path.insert(0, os.path.dirname(__file__))
SIZES = {
    "features": 128,
    "heads": 4,
    "kvheads": 2,
    "layers": 2,
    "tdim": 32,
    "txtdim": 64,
    "txtlayers": 3,
    "txtheads": 4,
    "txtkvheads": 4,
}


def main(pack) -> dict:
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models
    import torch
    from common import worst

    torch.manual_seed(0)
    config = comfy.supported_models.Krea2({"image_model": "krea2", **SIZES})
    config.set_inference_dtype(torch.float32, None)
    model = comfy.model_base.Krea2(config)
    for weight in model.diffusion_model.parameters():
        weight.data.normal_(std=0.2)
    patcher = comfy.model_patcher.ModelPatcher(
        model, load_device=torch.device("cpu"), offload_device=torch.device("cpu")
    )
    a, b, negative = ([[torch.randn(1, tokens, 3 * 64), {}]] for tokens in (5, 9, 2))
    latent = {"samples": torch.zeros(1, 16, 8, 8)}
    (wrapped,) = pack.run("UniFusionScheduleModel", model=patcher)
    (scheduled,) = pack.run(
        "UniFusionSchedule",
        conditionings={"a": a, "b": b},
        schedule="a:0-0.25, b:0.25-1",
        fade="prediction",
        preview_steps=8,
    )

    def sample(model, positive):
        with torch.inference_mode():
            (out,) = pack.core.KSampler().sample(model, 1, 8, 2.0, "euler", "simple", positive, negative, latent, 1.0)
        return out["samples"]

    with_ranges = [
        [a[0][0], {"start_percent": 0.0, "end_percent": 1.5 / 8}],
        [b[0][0], {"start_percent": 1.5 / 8, "end_percent": 1.0}],
    ]
    (exported,) = pack.run("UniFusionScheduleToRanges", conditioning=scheduled, steps=8)
    base = sample(wrapped, scheduled)
    return {
        "finite": bool(torch.isfinite(base).all()),
        "core's ranges": worst(base, sample(patcher, with_ranges)),
        "its export without a wrapper": worst(base, sample(patcher, exported)),
        "b alone": worst(base, sample(patcher, b)),
        "class": type(model).__name__,
    }
