"""Looking into the pooling of layers, and taking layers out."""

from __future__ import annotations

import re

import numpy as np
import torch
from comfy_api.latest import io

from ..unifusion_core.conditioning.lap import LAPSpec
from ..unifusion_core.conditioning.last_layer import LayerSpec
from ..unifusion_core.conditioning_choice import describe
from . import sockets
from .encode import check_layers
from .limits import within_limits

CATEGORY = "UniFusion/inspect"
FIGURES = ("layer weights", "attention norms", "layer similarity", "dropout effect")


class LayerInspector(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniFusionLayerInspector",
            display_name="UniFusion Layer Inspector",
            category=CATEGORY,
            description="Draws what LAP does with the layers of the VLM, as the paper's Fig. 6, 7, 8 and 18 do.",
            search_aliases=["layer weights", "attention norms", "analyse lap", "heat map"],
            inputs=[
                sockets.Fusion.Input("fusion", tooltip="From UniFusion Load Model."),
                sockets.Hidden.Input("hidden", tooltip="From UniFusion Rewrite."),
                io.Combo.Input("figure", options=list(FIGURES), default=FIGURES[0], tooltip="What to draw."),
            ],
            outputs=[io.Image.Output(tooltip="The figure.")],
        )

    @classmethod
    @within_limits
    def execute(cls, fusion, hidden, figure) -> io.NodeOutput:
        from ..unifusion_core.evaluation.figures import figure as draw
        from ..unifusion_core.fusion import check_vlm

        check_drawable(figure, fusion.spec)
        check_layers(fusion.spec, hidden.layers)
        hidden = hidden.tapping(fusion.spec.layers)
        check_vlm(fusion.spec, hidden.vlm, hidden.layers)
        image = draw(figure, fusion.ready().lap, hidden)
        return io.NodeOutput(torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255)[None])


class LayerDropout(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniFusionLayerDropout",
            display_name="UniFusion Layer Dropout",
            category=CATEGORY,
            description="Sets the pooling weight of some layers to zero, to see in the picture what they carry.",
            search_aliases=["drop layers", "ablation", "skip layer"],
            inputs=[
                sockets.Fusion.Input("fusion", tooltip="From UniFusion Load Model."),
                io.String.Input(
                    "layers", default="", tooltip="Numbers of tapped layers, such as 5 or 2, 8. Empty drops none."
                ),
            ],
            outputs=[sockets.Fusion.Output(display_name="fusion", tooltip="To UniFusion LAP Encode.")],
        )

    @classmethod
    @within_limits
    def execute(cls, fusion, layers) -> io.NodeOutput:
        if layers.strip() and isinstance(fusion.spec.lap, LayerSpec):
            raise ValueError(f"this model reads {describe(fusion.spec)}: there is none to leave out; empty layers")
        return io.NodeOutput(fusion.without(dropped(layers, fusion.spec.layers)))


def check_drawable(figure: str, spec) -> None:
    """Raises ValueError where a figure is of LAP and the model has a rival in its place."""
    if figure != "layer similarity" and not isinstance(spec.lap, LAPSpec):
        raise ValueError(
            f"figure {figure!r} is of LAP, but this model reads {describe(spec)}; choose layer similarity, or a model "
            "with one LAP"
        )


def dropped(text: str, tapped: tuple[int, ...]) -> tuple[int, ...]:
    """Layer numbers as written → their places among the tapped layers."""
    words = [word for word in re.split(r"[\s,]+", text.strip()) if word]
    if odd := [word for word in words if not word.isascii() or not word.isdigit() or int(word[:9]) not in tapped]:
        raise ValueError(f"layer {odd[0][:20]!r} is not tapped; this model taps {', '.join(map(str, tapped))}")
    places = tuple(sorted({tapped.index(int(word)) for word in words}))
    if len(places) == len(tapped):
        raise ValueError("every layer is dropped; leave at least one")
    return places


NODES = [LayerInspector, LayerDropout]
