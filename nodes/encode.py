"""Prompt and pictures → hidden states → condition tokens: VERIFI, LAP, refiner."""

from __future__ import annotations

import weakref

import comfy.utils
import torch
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy_api.latest import io, ui
from comfy_execution.utils import get_executing_context
from PIL import Image
from server import PromptServer
from torch.utils.weak import WeakTensorKeyDictionary

from . import sockets
from .limits import within_limits

CATEGORY = "UniFusion/conditioning"
MAX_IMAGES, MAX_TILES = 8, 9  # the paper's ten tiles are nine and the thumbnail
SEED_MAX = 2**64 - 1
PAPER = ("image", "thumbnail", "rewrite")  # what reaches the DiT


class Rewrite(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        seed = io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=SEED_MAX,
            control_after_generate=True,
            tooltip="Of the words, not of the picture.",
        )
        random = [
            io.Float.Input("temperature", default=0.7, min=0.01, max=5.0, step=0.01, tooltip="Higher is more varied."),
            io.Float.Input("top_p", default=0.9, min=0.01, max=1.0, step=0.01, tooltip="Share of probability kept."),
            seed,
        ]
        return io.Schema(
            node_id="UniFusionRewrite",
            display_name="UniFusion Rewrite (VERIFI)",
            category=CATEGORY,
            description="The VLM reads prompt and pictures and writes what the picture should show; the states of the "
            "words it writes, and of the pictures' tokens, are kept from that same pass.",
            search_aliases=["verifi", "prompt rewriter", "prompt enhance", "vlm", "image encode"],
            inputs=[
                sockets.VLM.Input("vlm", tooltip="From UniFusion Load VLM."),
                io.String.Input(
                    "prompt", multiline=True, dynamic_prompts=True, default="", tooltip="What you want, in your words."
                ),
                io.Autogrow.Input(
                    "images",
                    optional=True,
                    tooltip="Reference pictures, in the order in which the prompt speaks of them.",
                    template=io.Autogrow.TemplatePrefix(
                        io.Image.Input("image", tooltip="A reference picture; of a batch, each is one."),
                        prefix="image",
                        min=0,
                        max=MAX_IMAGES,
                    ),
                ),
                io.Int.Input(
                    "max_tiles",
                    default=MAX_TILES,
                    min=1,
                    max=MAX_TILES,
                    tooltip="Most tiles per picture beside its thumbnail. More tiles, more detail and more tokens.",
                ),
                io.DynamicCombo.Input(
                    "sampling",
                    options=[
                        io.DynamicCombo.Option("greedy", []),
                        io.DynamicCombo.Option("random", random),
                        io.DynamicCombo.Option("off", []),
                    ],
                    tooltip="How words are chosen. Off: no rewriting; the prompt's own tokens condition the picture.",
                ),
                io.Int.Input(
                    "max_new_tokens", default=128, min=1, max=4096, tooltip="The rewrite ends here at the latest."
                ),
                io.String.Input(
                    "text",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="Use this text instead of a rewrite, such as an edited one. Empty: the VLM writes.",
                ),
                io.String.Input(
                    "system_prompt",
                    multiline=True,
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="How the VLM should rewrite. Empty: what this VLM was trained with.",
                ),
            ],
            outputs=[
                sockets.Hidden.Output(display_name="hidden", tooltip="States of every tapped layer, to LAP Encode."),
                io.String.Output(display_name="text", tooltip="What the VLM wrote."),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    @within_limits
    def execute(
        cls, vlm, prompt, max_tiles, sampling=None, max_new_tokens=128, images=None, text="", system_prompt=""
    ) -> io.NodeOutput:
        from ..unifusion_core.conditioning.verifi import replay, rewrite
        from ..unifusion_core.conditioning.vlm import Request

        pictures = [picture for batch in (images or {}).values() if batch is not None for picture in to_pil(batch)]
        request = Request(prompt, tuple(pictures), system=system_prompt.strip() or None, max_tiles=max_tiles)
        ready, mode = vlm.ready(), sampling["sampling"]
        if not prompt.strip():
            raise ValueError("the prompt is empty; say what the picture should show, or how it should change")
        if text.strip():
            hidden = replay(ready, [request], [ready.tokenizer(text.strip(), add_special_tokens=False).input_ids])
            written = text.strip()
        elif mode == "off":
            hidden, written = ready.encode([request]), prompt
        else:
            settings = {key: sampling[key] for key in ("temperature", "top_p", "seed") if key in sampling}
            rewrites = rewrite(
                ready, [request], max_new_tokens=max_new_tokens, on_token=_stream(max_new_tokens), **settings
            )
            hidden, written = rewrites.hidden_states, rewrites.texts[0]
        return io.NodeOutput(hidden.to("cpu"), written, ui=ui.PreviewText(written))


class LAPEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniFusionLAPEncode",
            display_name="UniFusion LAP Encode",
            category=CATEGORY,
            description="Layerwise attention pooling: the states of all tapped layers, token by token, become one.",
            search_aliases=["lap", "layerwise attention pooling", "pool layers"],
            inputs=[
                sockets.Fusion.Input("fusion", tooltip="From UniFusion Load Model."),
                sockets.Hidden.Input("hidden", tooltip="From UniFusion Rewrite."),
                io.Combo.Input(
                    "tokens",
                    options=["image + rewrite", "everything"],
                    default="image + rewrite",
                    advanced=True,
                    tooltip="The paper keeps tokens of pictures and of the rewrite. Everything: system prompt and "
                    "instruction too, for UniFusion Select Tokens to choose from.",
                ),
            ],
            outputs=[io.Conditioning.Output(display_name="pooled", tooltip="To UniFusion Refine.")],
        )

    @classmethod
    @within_limits
    def execute(cls, fusion, hidden, tokens="image + rewrite") -> io.NodeOutput:
        present = {span.kind for row in hidden.spans for span in row}
        if tokens == "image + rewrite":
            wanted = PAPER if "rewrite" in present else ("image", "thumbnail", "instruction")
            hidden = hidden.select(*wanted)
        return io.NodeOutput(sockets.from_pooled(fusion.ready().pool(hidden).to("cpu"), fusion.spec.name))


class Refine(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniFusionRefine",
            display_name="UniFusion Refine",
            category=CATEGORY,
            description="The bidirectional refiner over the pooled tokens: what comes out conditions the DiT.",
            search_aliases=["refiner", "token refiner"],
            inputs=[
                sockets.Fusion.Input("fusion", tooltip="The same as at UniFusion LAP Encode."),
                io.Conditioning.Input("conditioning", tooltip="Pooled tokens, all of them or selected ones."),
            ],
            outputs=[io.Conditioning.Output(tooltip="To a sampler, core's or ours, or to UniFusion Schedule.")],
        )

    @classmethod
    @within_limits
    def execute(cls, fusion, conditioning) -> io.NodeOutput:
        return io.NodeOutput([refined(fusion, entry) for entry in conditioning])


class EmptyConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniFusionEmptyConditioning",
            display_name="UniFusion Empty Conditioning",
            category=CATEGORY,
            description="The true empty prompt, encoded as in training: the negative for guidance.",
            search_aliases=["negative", "unconditional", "empty prompt", "cfg"],
            inputs=[
                sockets.VLM.Input("vlm", tooltip="From UniFusion Load VLM."),
                sockets.Fusion.Input("fusion", tooltip="From UniFusion Load Model."),
            ],
            outputs=[io.Conditioning.Output(display_name="negative", tooltip="One token.")],
        )

    @classmethod
    @within_limits
    def execute(cls, vlm, fusion) -> io.NodeOutput:
        hidden = vlm.ready().encode_empty().to("cpu")
        pooled = sockets.from_pooled(fusion.ready().pool(hidden).to("cpu"), fusion.spec.name)
        return io.NodeOutput([refined(fusion, entry) for entry in pooled])


def refined(fusion, entry: list) -> list:
    """One pooled entry of a CONDITIONING, refined."""
    note = sockets.note_of(entry)
    if not sockets.is_pooled(entry[0]):
        raise ValueError("the conditioning is refined already: connect it to the sampler as it is")
    if note["vlm"] != (fusion.spec.vlm or note["vlm"]):
        raise ValueError(f"the conditioning comes from the VLM {note['vlm']}, but this refiner is of {fusion.spec.vlm}")
    head = fusion.ready()
    like = next(head.refiner.parameters())
    condition = head.refine(sockets.to_pooled(entry).to(like.device, like.dtype))
    return [sockets.pack(condition, sockets.REFINED), entry[1]]


def refined_part(fusion, entry: list, kinds: tuple[str, ...] | None) -> list:
    """These kinds of tokens of a pooled entry (None: all), refined by themselves.

    Remembered for as long as the entry's tokens live, so that another schedule over them refines nothing again.
    """
    parts = _PARTS.setdefault(entry[0], {})
    key = kinds, id(fusion.refiner)
    if key not in parts or parts[key][0]() is not fusion.refiner:  # an id may come back
        selected = entry if kinds is None else sockets.select(entry, kinds)
        parts[key] = weakref.ref(fusion.refiner), refined(fusion, selected)
    return parts[key][1]


_PARTS = WeakTensorKeyDictionary()


def to_pil(batch: torch.Tensor) -> list[Image.Image]:
    """IMAGE [B, H, W, 3] in 0..1 → pictures; a fourth channel counts as alpha over white."""
    pixels = batch.detach().float().cpu()
    if pixels.shape[-1] == 4:
        pixels = pixels[..., :3] * pixels[..., 3:] + 1 - pixels[..., 3:]
    return [Image.fromarray(image.numpy()) for image in (pixels.clamp(0, 1) * 255).round().byte()]


def _stream(most: int):
    """Shows the text on the node while it grows, and lets a user cancel between two tokens."""
    bar, context, server = comfy.utils.ProgressBar(most), get_executing_context(), PromptServer.instance
    done = 0

    def on_token(row: int, token: int, text: str) -> None:
        nonlocal done
        done += 1
        bar.update_absolute(done)
        throw_exception_if_processing_interrupted()  # the bar asks only every tenth of a second
        if context is not None and server is not None:
            server.send_progress_text(text, context.node_id)

    return on_token


NODES = [Rewrite, LAPEncode, Refine, EmptyConditioning]
