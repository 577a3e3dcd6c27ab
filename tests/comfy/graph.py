"""Prompts for ComfyUI's API, written as the graph reads."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

CAPTION = "one shape on a white background : a large red circle at top-center"


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
            waiting += [value[0] for value in prompt[name]["inputs"].values() if isinstance(value, list)]
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
    box["lap"] = graph.add("UniFusionLAPEncode", fusion=box["model"][1], hidden=box["rewrite"])
    box["positive"] = graph.add("UniFusionRefine", fusion=box["model"][1], conditioning=box["lap"])
    box["negative"] = graph.add("UniFusionEmptyConditioning", vlm=box["vlm"], fusion=box["model"][1])
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
