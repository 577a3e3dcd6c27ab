"""Choosing and mixing condition tokens."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from . import sockets
from .limits import within_limits

CATEGORY = "UniFusion/conditioning"
KINDS = {
    "image": ("image", "thumbnail"),
    "tiles": ("image",),
    "thumbnail": ("thumbnail",),
    "rewrite": ("rewrite",),
    "instruction": ("instruction",),
    "system": ("system",),
    "image + rewrite": ("image", "thumbnail", "rewrite"),
    "think": ("think",),
    "think + rewrite": ("think", "rewrite"),
    "user turn": ("image", "thumbnail", "instruction", "marker"),
}


class SelectTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniFusionSelectTokens",
            display_name="UniFusion Select Tokens",
            category=CATEGORY,
            description="Keeps some of the tokens: of the pictures, of one picture or tile, of the rewrite.",
            search_aliases=["filter tokens", "image tokens", "text tokens", "span"],
            inputs=[
                io.Conditioning.Input(
                    "conditioning", tooltip="Best before UniFusion Refine, since refining mixes the tokens."
                ),
                io.Combo.Input("kinds", options=list(KINDS), default="image", tooltip="Which tokens stay."),
                io.Int.Input("image", default=-1, min=-1, max=63, tooltip="Only this picture; 0 is the first, -1 all."),
                io.Int.Input("tile", default=-1, min=-1, max=63, tooltip="Only this tile; 0 is the first, -1 all."),
            ],
            outputs=[io.Conditioning.Output(tooltip="Pooled or refined, as it came.")],
        )

    @classmethod
    @within_limits
    def execute(cls, conditioning, kinds, image=-1, tile=-1) -> io.NodeOutput:
        one, part = (None if number < 0 else number for number in (image, tile))
        return io.NodeOutput([sockets.select(entry, KINDS[kinds], one, part) for entry in conditioning])


class MixConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        def weight(tooltip: str) -> list:
            return [io.Float.Input("weight", default=0.5, min=0.0, max=1.0, step=0.01, tooltip=tooltip)]

        return io.Schema(
            node_id="UniFusionMixConditioning",
            display_name="UniFusion Mix Conditioning",
            category=CATEGORY,
            description="Brings two conditionings together: side by side, averaged, or in what the DiT predicts.",
            search_aliases=["combine", "average", "concat", "blend"],
            inputs=[
                io.Conditioning.Input("a", tooltip="Of one entry, pooled or refined."),
                io.Conditioning.Input("b", tooltip="Of one entry, pooled or refined as a is."),
                io.DynamicCombo.Input(
                    "mode",
                    options=[
                        io.DynamicCombo.Option("concatenate", []),
                        io.DynamicCombo.Option("average", weight("Share of a; b has the rest. Equal lengths only.")),
                        io.DynamicCombo.Option(
                            "prediction", weight("Share of a's prediction. Two forwards a step; any lengths.")
                        ),
                    ],
                    tooltip="Concatenate: one sequence. Average: token by token. Prediction: the DiT's two answers.",
                ),
            ],
            outputs=[io.Conditioning.Output(tooltip="Pooled or refined, as they came.")],
        )

    @classmethod
    @within_limits
    def execute(cls, a, b, mode=None) -> io.NodeOutput:
        if mode["mode"] == "prediction":
            both = [(entry, mode["weight"]) for entry in a] + [(entry, 1 - mode["weight"]) for entry in b]
            return io.NodeOutput([_weighted(entry, weight) for entry, weight in both if weight > 0])
        first, second = _only(a, "a"), _only(b, "b")
        if sockets.is_pooled(first[0]) != sockets.is_pooled(second[0]):
            raise ValueError("one conditioning is refined and the other only pooled: refine both, or mix before that")
        if mode["mode"] == "concatenate":
            return io.NodeOutput([sockets.concatenate(first, second)])
        return io.NodeOutput([_averaged(first, second, mode["weight"])])


def _averaged(first: list, second: list, weight: float) -> list:
    sockets.note_of(first), sockets.note_of(second)
    if first[0].shape[1:] != second[0].shape[1:]:
        raise ValueError(
            f"{first[0].shape[1]} and {second[0].shape[1]} tokens cannot be averaged; choose concatenate or prediction"
        )
    return [torch.lerp(second[0], first[0], weight), first[1]]


def _weighted(entry: list, weight: float) -> list:
    sockets.note_of(entry)
    return sockets.renamed(entry, strength=entry[1].get("strength", 1.0) * weight)


def _only(conditioning: list, name: str) -> list:
    if len(conditioning) != 1:
        raise ValueError(
            f"conditioning {name} has {len(conditioning)} entries; mix before Combine or UniFusion Schedule, "
            "or choose prediction"
        )
    return conditioning[0]


NODES = [SelectTokens, MixConditioning]
