"""Models with LAP's rivals, small and random: the nodes' latents against unifusion_core's own pipeline."""

import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, os.path.dirname(__file__))
NUM_LAYERS, STEPS, GUIDANCE, SEED = 11, 4, 2.5, 3
LONG, SHORT = "a big red heart and a small blue star", "a star"
EDIT = "paint the heart green"
RIVALS = {  # name → conditioning, refiner, layers
    "last": ("last", None, None),
    "penultimate": ("penultimate", "after", None),
    "keys": ("keys", None, None),
    "keys, refined": ("keys", "after", None),
    "injection": ("injection", None, None),
    "lap-per-block": ("lap-per-block", None, None),
    "refiner before": ("lap", "before", None),
    "refiner none": ("lap", "none", None),
    "every layer": ("lap", "after", "every"),
}


def main(pack, t5: str) -> dict:
    pack.load_core_extras()
    facts = {name: rival(pack, name, *way) for name, way in RIVALS.items()}
    facts["t5"] = of_t5(pack, t5)
    facts["side by side"] = side_by_side(pack)
    facts["refused"] = refused(pack)
    return facts


def folder() -> Path:
    import folder_paths

    found = Path(folder_paths.models_dir) / "unifusion" / "rivals"
    found.mkdir(parents=True, exist_ok=True)
    return found


def place(pack, name: str, spec) -> str:
    """Writes a model of random weights with the micro VLM's VAE beside it; returns its name in the loader's list."""
    import torch

    core = pack.module("unifusion_core.pipeline")
    modules = torch.nn.ModuleDict(
        {
            "lap": pack.module("unifusion_core.conditioning.pooling").build_pooling(spec.lap),
            "refiner": pack.module("unifusion_core.conditioning.refiner").Refiner(spec.refiner),
            "dit": pack.module("unifusion_core.diffusion.dit").DiT(spec.dit),
        }
    )
    generator = torch.Generator().manual_seed(len(name))
    for weight in modules.parameters():
        torch.nn.init.normal_(weight, std=0.15, generator=generator)
    stem = name.replace(", ", "-").replace(" ", "-")
    core.save_generator(folder() / f"{stem}.safetensors", spec, modules)
    if not (folder() / "vae.safetensors").exists():
        os.symlink(core.WEIGHTS / "micro" / "vae.safetensors", folder() / "vae.safetensors")
        os.symlink(core.WEIGHTS / "micro" / "vlm", folder() / "vlm")
    return f"unifusion/rivals/{stem}.safetensors"


def spec_of(pack, name: str, conditioning: str, refiner, layers, num_layers: int = NUM_LAYERS):
    presets = pack.module("unifusion_core.presets")
    small = presets.micro()
    dit = replace(small.dit, depth=3, num_heads=2, head_dim=32, intermediate_size=64, timestep_dim=32)
    small = replace(small, name=name, dit=dit)
    chosen = pack.module("unifusion_core.conditioning_choice").with_conditioning
    return chosen(small, conditioning, refiner=refiner, layers=layers, num_layers=num_layers)


class Graph:
    """The nodes of one model, and the same model in core."""

    def __init__(self, pack, name: str, spec, vlm: str = "unifusion/rivals/vlm"):
        self.pack, self.run, self.spec = pack, pack.run, spec
        file = place(pack, name, spec)
        (self.vlm,) = self.run("UniFusionLoadVLM", vlm=vlm)
        self.model, self.fusion, self.vae = self.run("UniFusionLoadModel", model=file, dtype="fp32")
        (self.negative,) = self.run("UniFusionEmptyConditioning", vlm=self.vlm, fusion=self.fusion)

    def hidden(self, prompt, images=None, sampling="greedy"):
        words = {"prompt": prompt, "images": images or {}, "max_tiles": 9, "max_new_tokens": 24}
        return self.run("UniFusionRewrite", vlm=self.vlm, **words, sampling={"sampling": sampling}, fusion=self.fusion)[
            0
        ]

    def pooled(self, hidden, tokens="image + rewrite"):
        return self.run("UniFusionLAPEncode", fusion=self.fusion, hidden=hidden, tokens=tokens)[0]

    def refined(self, conditioning):
        return self.run("UniFusionRefine", fusion=self.fusion, conditioning=conditioning)[0]

    def encoded(self, prompt, images=None, tokens="image + rewrite", sampling="greedy"):
        return self.refined(self.pooled(self.hidden(prompt, images, sampling), tokens))

    def sample(self, positive, batch=1, node="UniFusionSampler"):
        (latent,) = self.run("UniFusionEmptyLatent", model=self.model, width=64, height=64, batch_size=batch)
        both = {"model": self.model, "positive": positive, "negative": self.negative, "latent_image": latent}
        both |= {"seed": SEED, "steps": STEPS, "denoise": 1.0}
        if node == "UniFusionSampler":
            own = {"guidance": GUIDANCE, "sampler": "euler", "scheduler": "flow"}
        else:
            own = {"cfg": GUIDANCE, "sampler_name": "euler", "scheduler": "simple"}
        return self.run(node, **both, **own)[0]["samples"]


def rival(pack, name, conditioning, refiner, layers) -> dict:
    import numpy as np
    import torch
    from common import SCENE, relative
    from PIL import Image

    spec = spec_of(pack, name, conditioning, refiner, layers)
    graph = Graph(pack, name, spec)
    core = model_of(pack, name)
    vlm = pack.module("unifusion_core.conditioning.vlm")
    options = {"max_new_tokens": 24}

    (picture,) = pack.run("UniFusionMicroScene", caption=SCENE, seed=4)
    image = Image.fromarray((picture[0].numpy() * 255).round().astype(np.uint8))
    long, short = (core.prepare([vlm.Request(prompt)], **options) for prompt in (LONG, SHORT))
    edit = core.prepare([vlm.Request(EDIT, images=(image,))], **options)

    def theirs(conditions, **more):
        noise = {"steps": STEPS, "guidance": GUIDANCE, "seed": SEED, **more}
        with torch.inference_mode():
            return core.sample(conditions, **noise)

    positive = graph.encoded(LONG)
    plain, base = graph.sample(positive), theirs(long)
    ours = {"image": {"image0": picture}}
    if refiner == "before":
        tracks = {t: graph.encoded(EDIT, ours["image"], tokens) for t, tokens in (("a", "image"), ("b", "rewrite"))}
    else:
        whole = graph.pooled(graph.hidden(EDIT, ours["image"]))
        chosen = {"a": "image", "b": "rewrite"}
        tracks = {t: graph.refined(selected(graph, whole, kinds)) for t, kinds in chosen.items()}
    (switch,) = pack.run(
        "UniFusionSchedule", conditionings=tracks, schedule="a:0-0.5, b:0.5-1", fade="prediction", preview_steps=20
    )
    (mixed,) = pack.run("UniFusionMixConditioning", a=tracks["a"], b=tracks["b"], mode={"mode": "concatenate"})
    core_tracks = {"a": edit.tracks["image"], "b": edit.tracks["text"]}
    stack = pack.module("unifusion_core.condition").stack
    both = stack([long.tracks["text"], short.tracks["text"]])
    (decoded,) = pack.run("UniFusionVAEDecode", vae=graph.vae, samples={"samples": plain})
    with torch.inference_mode():
        expected = np.stack([np.asarray(each) for each in core.decode(base)]) / 255
        joined = stack_along(core_tracks["a"], core_tracks["b"], type(both))
    found = {
        "size": float(base.std()),
        "UniFusionSampler": relative(plain, base),
        "KSampler": relative(graph.sample(positive, node="KSampler"), base),
        "picture": float(np.abs(decoded.numpy() - expected).max()),
        "unlike another prompt": relative(theirs(short), base),
        "lengths": [len(graph.negative[0][0][0]), *(len(tracks[name][0][0][0]) for name in "ab")],
        "switch": relative(graph.sample(switch), theirs(core_tracks, schedule="a:0-0.5, b:0.5-1")),
        "concatenated": relative(graph.sample(mixed), theirs({"a": joined}, schedule="a:0-1")),
        "one prompt, batch 2": relative(graph.sample(positive, batch=2)[:1], base),
        "off": relative(
            graph.sample(graph.encoded(LONG, sampling="off")),
            theirs(core.prepare([vlm.Request(LONG)], rewriting=False)),
        ),
        "layers": list(spec.layers),
    }
    found |= padding(graph, core, both, stack([core.empty(), long.tracks["text"]]))
    if refiner != "before":
        (parts,) = pack.run(
            "UniFusionSchedule",
            conditionings={"a": whole},
            schedule="image:0-0.5, text:0.5-1",
            fade="prediction",
            preview_steps=20,
            fusion=graph.fusion,
        )
        found["switch of its own parts"] = relative(graph.sample(parts), graph.sample(switch))
    return found


def padding(graph, core, both, negative) -> dict:
    """Prompts of two lengths, and a negative as long as they, as one batch of four rows with a mask."""
    import comfy.sample
    import torch
    from common import relative

    sockets, flow = graph.pack.module("nodes.sockets"), graph.pack.module("unifusion_core.diffusion.sampler")
    note = graph.negative[0][1]
    one, two = ([[sockets.pack(each, sockets.REFINED), note]] for each in (both, negative))
    two[0][0] = two[0][0][:1]
    plan = core.plan(["a"], schedule="a:0-1", steps=STEPS, guidance=GUIDANCE)
    noise = comfy.sample.prepare_noise(torch.zeros(2, *plan.latent_shape), SEED)
    with torch.inference_mode():
        velocity = flow.guided(core.velocity(both), core.velocity(core.empty()), GUIDANCE)
        expected = flow.sample_euler(velocity, noise, plan.timesteps, None)
    alone, rows, model, short = graph.sample(one, batch=2), [], graph.model, graph.negative
    graph.model, graph.negative = model.clone(), two

    def wrapper(execute, x, *args, **options):
        rows.append(len(x))
        return execute(x, *args, **options)

    graph.model.add_wrapper_with_key("diffusion_model", "count", wrapper)
    together = graph.sample(one, batch=2)
    graph.model, graph.negative = model, short
    return {
        "two prompts in one batch": relative(alone, expected),
        "with their negative": relative(together, expected),
        "rows": rows,
    }


def selected(graph, conditioning, kinds):
    return graph.run("UniFusionSelectTokens", conditioning=conditioning, kinds=kinds, image=-1, tile=-1)[0]


def stack_along(first, second, kind):
    """Two refined conditions as one sequence."""
    import torch

    empty = torch.zeros(1, second.tokens.shape[1], 3)
    positions = torch.cat([first.positions, empty if second.positions is None else second.positions], dim=1)
    return kind(torch.cat([first.tokens, second.tokens], dim=1), None, positions)


def model_of(pack, name):
    stem = name.replace(", ", "-").replace(" ", "-")
    return pack.module("unifusion_core.pipeline").load_model(folder() / f"{stem}.safetensors")


def of_t5(pack, source: str) -> dict:
    """A model that a T5 conditions, through the same nodes."""
    import torch
    from common import SCENE, relative

    spec = spec_of(pack, "t5", "last", None, None, num_layers=6)
    home = Path(source).name
    import folder_paths

    os.symlink(source, Path(folder_paths.models_dir) / "vlm" / home)
    graph = Graph(pack, "t5", spec, vlm=f"vlm/{home}")
    pipeline, vlm = pack.module("unifusion_core.pipeline"), pack.module("unifusion_core.conditioning.vlm")
    found, parts = pipeline.load_generator(folder() / "t5.safetensors")
    vae = pipeline.load_vae(folder() / "vae.safetensors")
    core = pipeline.UniFusion(found, vlm.load_vlm(source, dtype=torch.float32), *parts, vae)
    with torch.inference_mode():
        conditions = core.prepare([vlm.Request(LONG)], rewriting=False)
        base = core.sample(conditions, steps=STEPS, guidance=GUIDANCE, seed=SEED)
    positive = graph.encoded(LONG, sampling="off")
    (picture,) = pack.run("UniFusionMicroScene", caption=SCENE, seed=4)
    return {
        "UniFusionSampler": relative(graph.sample(positive), base),
        "KSampler": relative(graph.sample(positive, node="KSampler"), base),
        "lengths": [len(graph.negative[0][0][0]), len(positive[0][0][0])],
        "writing": said(graph.hidden, LONG),
        "picture": said(graph.hidden, LONG, {"image0": picture}, "off"),
        "text": said(
            lambda: pack.run(
                "UniFusionRewrite",
                vlm=graph.vlm,
                prompt=LONG,
                max_tiles=9,
                sampling={"sampling": "off"},
                text="one shape",
            )
        ),
    }


def side_by_side(pack) -> dict:
    """Models that read fewer layers take theirs from states that hold more."""
    from common import worst

    every = Graph(pack, "every layer", spec_of(pack, "every layer", *RIVALS["every layer"]))
    hidden = every.hidden(LONG)
    found = {}
    for name in ("penultimate", "keys"):
        graph = Graph(pack, name, spec_of(pack, name, *RIVALS[name]))
        found[name] = worst(graph.pooled(hidden)[0][0], graph.pooled(graph.hidden(LONG))[0][0])
    return found


def said(run, *args, **options) -> str:
    try:
        run(*args, **options)
    except ValueError as error:
        return str(error)
    return ""


def refused(pack) -> dict:
    from common import SCENE

    before, alone, keys, block, every = (
        Graph(pack, name, spec_of(pack, name, *RIVALS[name]))
        for name in ("refiner before", "penultimate", "keys", "lap-per-block", "every layer")
    )
    (picture,) = pack.run("UniFusionMicroScene", caption=SCENE, seed=4)
    pooled = before.pooled(before.hidden(EDIT, {"image0": picture}))
    words = {"prompt": LONG, "max_tiles": 9, "max_new_tokens": 8, "sampling": {"sampling": "off"}}
    (thirds, *_) = pack.run("UniFusionRewrite", vlm=alone.vlm, **words)
    (micro,) = pack.run("UniFusionLoadVLM", vlm="micro (embedded)")
    named = replace(keys.fusion.spec, vlm="another-vlm")
    stranger = replace(keys.fusion, head=replace(keys.fusion.head, spec=named))

    def draws(graph, figure):
        return said(pack.run, "UniFusionLayerInspector", fusion=graph.fusion, hidden=graph.hidden(LONG), figure=figure)

    schedule = {"schedule": "image:0-0.5, text:0.5-1", "fade": "prediction", "preview_steps": 20}
    dropout = "UniFusionLayerDropout"
    return {
        "parts of mixed tokens": said(
            pack.run, "UniFusionSchedule", conditionings={"a": pooled}, fusion=before.fusion, **schedule
        ),
        "layers that were not tapped": said(alone.pooled, thirds),
        "another model's width": said(keys.sample, alone.encoded(LONG)),
        "another VLM's fusion": said(pack.run, "UniFusionRewrite", vlm=micro, fusion=stranger, **words),
        "another VLM's empty prompt": said(pack.run, "UniFusionEmptyConditioning", vlm=micro, fusion=stranger),
        "one layer, weights": draws(alone, "layer weights"),
        "one layer, similarity": draws(alone, "layer similarity"),
        "keys, norms": draws(keys, "attention norms"),
        "keys, similarity": draws(keys, "layer similarity"),
        "a LAP per block, dropout": draws(block, "dropout effect"),
        "every layer, weights": draws(every, "layer weights"),
        "one layer, dropped": said(pack.run, dropout, fusion=alone.fusion, layers="10"),
        "one layer, none dropped": said(pack.run, dropout, fusion=alone.fusion, layers=""),
        "keys, one dropped": said(pack.run, dropout, fusion=keys.fusion, layers="5"),
    }
