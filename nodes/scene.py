"""Pictures of the micro-world, so that a template needs no file of its own."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import torch
from comfy_api.latest import io

from .limits import within_limits

CATEGORY = "UniFusion/micro-world"
LONGEST = 2000  # characters of a caption; sixteen things take 700
GRIDS = ((2, 2), (2, 3), (3, 2), (3, 3), (4, 4))  # rows and columns of 32 px
DEFAULT = "two shapes on a white background : a large red heart at top-left , a small blue star at bottom-right"


class MicroScene(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniFusionMicroScene",
            display_name="UniFusion Micro Scene",
            category=CATEGORY,
            description="Renders a caption of the micro-world, the one that the embedded model was trained in.",
            search_aliases=["micro world", "test image", "shapes"],
            inputs=[
                io.String.Input(
                    "caption", multiline=True, default=DEFAULT, tooltip="A canonical caption, as VERIFI writes."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**32 - 1,
                    control_after_generate=False,
                    tooltip="Of what the caption leaves open: shade, turn, marks.",
                ),
            ],
            outputs=[io.Image.Output(tooltip="64 px; larger for larger grids.")],
        )

    @classmethod
    @within_limits
    def execute(cls, caption, seed=0) -> io.NodeOutput:
        from ..unifusion_core.microworld.caption import parse_caption
        from ..unifusion_core.microworld.render import render_array
        from ..unifusion_core.microworld.scene import sample_detail

        scene, rng = _parsed(caption, parse_caption), Random(seed)
        scene = scene.with_things([replace(thing, detail=sample_detail(rng)) for thing in scene.things])
        return io.NodeOutput(torch.from_numpy(np.asarray(render_array(scene), dtype=np.float32) / 255)[None])


def _parsed(caption: str, parse):
    """The scene on the smallest canvas that has its places.

    Raises:
        ValueError: why it fits not even the default one.
    """
    if len(caption) > LONGEST:
        raise ValueError(f"the caption has {len(caption)} characters; at most {LONGEST} are accepted")
    refused = None
    for grid in GRIDS:
        try:
            return parse(caption, *grid)
        except ValueError as error:
            refused = refused or error
    raise refused


NODES = [MicroScene]
