"""Prompts for ComfyUI's API, written as the graph reads."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

NODE_IDS = (  # ids never change
    "UniFusionLoadVLM",
    "UniFusionVLMFromCLIP",
    "UniFusionLoadModel",
    "UniFusionFusionFromModel",
    "UniFusionLoadLoRA",
    "UniFusionLoadAdapter",
    "UniFusionRewrite",
    "UniFusionLAPEncode",
    "UniFusionRefine",
    "UniFusionEmptyConditioning",
    "UniFusionEncodeForModel",
    "UniFusionSelectTokens",
    "UniFusionMixConditioning",
    "UniFusionSchedule",
    "UniFusionScheduleModel",
    "UniFusionScheduleToRanges",
    "UniFusionEmptyLatent",
    "UniFusionSampler",
    "UniFusionVAEDecode",
    "UniFusionLayerInspector",
    "UniFusionLayerDropout",
    "UniFusionMicroScene",
)
CAPTION = "one shape on a white background : a large red circle at top-left"


class Node:
    """One box of a graph: `node[k]` is a link from its output k, `node` alone one from its first output."""

    def __init__(self, name: str):
        self.name = name

    def __getitem__(self, slot: int) -> list:
        return [self.name, slot]


class Graph:
    """Boxes in the order they were added, named "1", "2", …

    g = Graph()
    vlm = g.add("UniFusionLoadVLM", vlm="micro (embedded)")
    hidden = g.add("UniFusionRewrite", vlm=vlm, prompt="…", **{"images.image0": picture[0]})
    """

    def __init__(self):
        self.boxes: dict[str, dict] = {}

    def add(self, kind: str, **inputs: Any) -> Node:
        node = Node(str(len(self.boxes) + 1))
        self.boxes[node.name] = {"class_type": kind, "inputs": {}}
        self.set(node, **inputs)
        return node

    def set(self, node: Node, **inputs: Any) -> None:
        """Changes inputs of a box that stands already."""
        self.boxes[node.name]["inputs"] |= {k: v[0] if isinstance(v, Node) else v for k, v in inputs.items()}

    def api(self) -> dict[str, dict]:
        return deepcopy(self.boxes)


def upstream(prompt: dict[str, dict], *names: str) -> dict[str, dict]:
    """The part of an API prompt that these boxes need."""
    kept, waiting = {}, list(names)
    while waiting:
        name = waiting.pop()
        if name in prompt and name not in kept:
            kept[name] = prompt[name]
            links = (value for value in prompt[name]["inputs"].values() if isinstance(value, list) and value)
            waiting += [link[0] for link in links if isinstance(link[0], str)]
    return {name: prompt[name] for name in prompt if name in kept}


def text_to_image(graph: Graph, prompt: str = CAPTION, size: int = 64, **sampling: Any) -> dict[str, Node]:
    """Adds the shortest whole chain on the embedded model, sampled and decoded by core nodes; its boxes by role.

    `sampling` goes to KSampler.
    """
    box = {"vlm": graph.add("UniFusionLoadVLM", vlm="micro (embedded)")}
    box["model"] = graph.add("UniFusionLoadModel", model="micro (embedded)", dtype="default")
    box["rewrite"] = graph.add(
        "UniFusionRewrite", vlm=box["vlm"], prompt=prompt, max_tiles=9, sampling="greedy", max_new_tokens=128
    )
    fusion = box["model"][1]
    box["lap"] = graph.add("UniFusionLAPEncode", fusion=fusion, hidden=box["rewrite"], tokens="image + rewrite")
    box["positive"] = graph.add("UniFusionRefine", fusion=fusion, conditioning=box["lap"])
    box["negative"] = graph.add("UniFusionEmptyConditioning", vlm=box["vlm"], fusion=fusion)
    box["latent"] = graph.add("UniFusionEmptyLatent", model=box["model"], width=size, height=size, batch_size=1)
    box["sampler"] = graph.add(
        "KSampler",
        **{
            "model": box["model"],
            "positive": box["positive"],
            "negative": box["negative"],
            "latent_image": box["latent"],
            "seed": 7,
            "steps": 4,
            "cfg": 3.0,
            "sampler_name": "euler",
            "scheduler": "simple",
            "denoise": 1.0,
            **sampling,
        },
    )
    box["decode"] = graph.add("VAEDecode", samples=box["sampler"], vae=box["model"][2])
    box["picture"] = graph.add("PreviewImage", images=box["decode"])
    return box


def every_node(graph: Graph, lora: str, adapter: str) -> dict[str, Node]:
    """Adds one box of every node of the pack, joined into a job that runs where standins/ are; the boxes by node id."""
    box = {}

    def add(kind: str, **inputs: Any) -> None:
        box[kind] = graph.add(kind, **inputs)

    add("UniFusionMicroScene", caption=CAPTION, seed=1)
    add("UniFusionLoadVLM", vlm="micro (embedded)", dtype="default", quantization="none", offload=False)
    add("UniFusionLoadModel", model="micro (embedded)", dtype="default")
    vlm, model = box["UniFusionLoadVLM"], box["UniFusionLoadModel"]
    add("UniFusionLoadLoRA", model=model, lora=lora, strength=1.0)
    add(
        "UniFusionRewrite",
        vlm=vlm,
        prompt="make the circle blue",
        max_tiles=4,
        sampling="random",
        max_new_tokens=24,
        text="",
        system_prompt="",
        profile="none",
        think="limit",
        think_tokens=8,
        protect_quotes=False,
        token_budget=0,
        fusion=model[1],
        **{"images.image0": box["UniFusionMicroScene"]},
        **{"sampling.temperature": 0.7, "sampling.top_p": 0.9, "sampling.seed": 1},
    )
    hidden = box["UniFusionRewrite"]
    add("UniFusionLayerDropout", fusion=model[1], layers="")
    add("UniFusionLayerInspector", fusion=model[1], hidden=hidden, figure="layer weights")
    add("UniFusionLAPEncode", fusion=box["UniFusionLayerDropout"], hidden=hidden, tokens="image + rewrite")
    pooled = box["UniFusionLAPEncode"]
    add("UniFusionSelectTokens", conditioning=pooled, kinds="image + rewrite", image=-1, tile=-1)
    add("UniFusionRefine", fusion=model[1], conditioning=box["UniFusionSelectTokens"])
    add("UniFusionEmptyConditioning", vlm=vlm, fusion=model[1])
    negative = box["UniFusionEmptyConditioning"]
    mix = {"mode": "prediction", "mode.weight": 0.5}
    add("UniFusionMixConditioning", a=box["UniFusionRefine"], b=negative, **mix)
    add(
        "UniFusionSchedule",
        schedule="image:0-0.5, text:0.5-1",
        fade="prediction",
        preview_steps=20,
        fusion=model[1],
        **{"conditionings.a": pooled},
    )
    scheduled = box["UniFusionSchedule"]
    add("UniFusionScheduleToRanges", conditioning=scheduled, steps=4)
    add("UniFusionScheduleModel", model=box["UniFusionLoadLoRA"])
    add("UniFusionEmptyLatent", model=model, width=64, height=64, batch_size=1)
    add(
        "UniFusionSampler",
        model=box["UniFusionScheduleModel"],
        positive=scheduled,
        negative=negative,
        latent_image=box["UniFusionEmptyLatent"],
        seed=3,
        steps=2,
        guidance=3.0,
        sampler="euler",
        scheduler="flow",
        denoise=1.0,
    )
    add("UniFusionVAEDecode", vae=model[2], samples=box["UniFusionSampler"])
    clip = graph.add("CLIPLoader", clip_name="qwen3vl_4b_fp8_scaled.safetensors", type="krea2")
    add("UniFusionVLMFromCLIP", clip=clip, dtype="default")
    dit = graph.add("UNETLoader", unet_name="krea2_turbo_fp8_scaled.safetensors", weight_dtype="default")
    add("UniFusionFusionFromModel", model=dit)
    add("UniFusionLoadAdapter", vlm=box["UniFusionVLMFromCLIP"], adapter=adapter)
    reader, adapted = box["UniFusionLoadAdapter"], box["UniFusionLoadAdapter"][1]
    words = {"prompt": CAPTION, "max_tiles": 1, "sampling": "off", "max_new_tokens": 8, "profile": "krea2"}
    states = graph.add("UniFusionRewrite", vlm=reader, **words)
    own = "profile's own"
    add("UniFusionEncodeForModel", hidden=states, profile="krea2", tokens=own, vlm=reader, adapter=adapted)
    return box
