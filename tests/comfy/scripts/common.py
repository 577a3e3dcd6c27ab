"""The micro model's graph up to the sampler, for the scripts beside."""

import torch

PROMPT = "a big red heart and a small blue star"
SCENE = "two shapes on a white background : a large red heart at top-left , a small blue star at bottom-right"


class Setting:
    """Loaded models, and conditionings of a prompt and of a picture with an edit."""

    def __init__(self, pack, model="micro (embedded)", edit="paint the heart green"):
        self.pack, self.run = pack, pack.run
        (self.vlm,) = self.run("UniFusionLoadVLM", vlm="micro (embedded)")
        self.model, self.fusion, self.vae = self.run("UniFusionLoadModel", model=model, dtype="default")
        (self.negative,) = self.run("UniFusionEmptyConditioning", vlm=self.vlm, fusion=self.fusion)
        (self.latent,) = self.run("UniFusionEmptyLatent", model=self.model, width=64, height=64, batch_size=1)
        (self.picture,) = self.run("UniFusionMicroScene", caption=SCENE, seed=4)
        self.prompt = self.refine(self.pool(PROMPT))
        self.pooled = self.pool(edit, {"image0": self.picture})
        self.image = self.refine(self.select("image"))
        self.text = self.refine(self.select("rewrite"))

    def pool(self, prompt, images=None):
        hidden, *_ = self.run(
            "UniFusionRewrite",
            vlm=self.vlm,
            prompt=prompt,
            images=images or {},
            max_tiles=9,
            sampling={"sampling": "greedy"},
            max_new_tokens=64,
        )
        return self.run("UniFusionLAPEncode", fusion=self.fusion, hidden=hidden)[0]

    def select(self, kinds):
        return self.run("UniFusionSelectTokens", conditioning=self.pooled, kinds=kinds, image=-1, tile=-1)[0]

    def refine(self, pooled):
        return self.run("UniFusionRefine", fusion=self.fusion, conditioning=pooled)[0]

    def schedule(self, text, fade="prediction", **tracks):
        return self.run(
            "UniFusionSchedule", conditionings=tracks, schedule=text, fade=fade, preview_steps=20, fusion=self.fusion
        )[0]

    def sample(
        self, positive, model=None, latent=None, steps=4, sampler="euler", scheduler="simple", cfg=2.5, denoise=1.0
    ):
        with torch.inference_mode():
            (out,) = self.pack.core.KSampler().sample(
                model or self.model,
                3,
                steps,
                cfg,
                sampler,
                scheduler,
                positive,
                self.negative,
                latent or self.latent,
                denoise,
            )
        return out["samples"]


def worst(a, b) -> float:
    return float((a - b).abs().max())


def relative(a, b) -> float:
    return float((a - b).norm() / b.norm())
