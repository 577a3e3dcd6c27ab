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

from ..unifusion_core.conditioning.hidden_states import KEEP
from ..unifusion_core.conditioning.profiles import PROFILES
from ..unifusion_core.conditioning_choice import describe
from . import sockets
from .limits import within_limits

CATEGORY = "UniFusion/conditioning"
MAX_IMAGES, MAX_TILES = 8, 9  # the paper's ten tiles are nine and the thumbnail
SEED_MAX = 2**64 - 1
MOST_TOKENS = 2**20
NO_PROFILE = "none"


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
                    tooltip="Use this text instead of a rewrite, such as an edited one, or a record of a rewrite, "
                    "which is replayed token by token. Empty: the VLM writes.",
                ),
                io.String.Input(
                    "system_prompt",
                    multiline=True,
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="How the VLM should rewrite. Empty: what this VLM was trained with.",
                ),
                io.Combo.Input(
                    "profile",
                    options=[NO_PROFILE, *PROFILES],
                    default=NO_PROFILE,
                    optional=True,
                    advanced=True,
                    tooltip="Keep the layers that this model is conditioned on, for UniFusion Encode for Model. With "
                    "sampling off, the prompt also stands in that model's own chat text. None: the VLM's own layers.",
                ),
                io.Combo.Input(
                    "think",
                    options=["keep", "drop", "limit"],
                    default="keep",
                    optional=True,
                    advanced=True,
                    tooltip="What becomes of a thinking VLM's thoughts. Keep: their states are kept, apart from the "
                    "rewrite's. Drop: only the rewrite's are kept. Limit: at most think_tokens are thought.",
                ),
                io.Int.Input(
                    "think_tokens",
                    default=256,
                    min=0,
                    max=MOST_TOKENS,
                    optional=True,
                    advanced=True,
                    tooltip="With think at limit: the thinking ends here at the latest. max_new_tokens then counts the "
                    "rewrite alone.",
                ),
                io.Boolean.Input(
                    "protect_quotes",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="What the prompt has in quotation marks, such as lettering, must stand in the rewrite "
                    "letter by letter; a rewrite without it is an error.",
                ),
                io.Int.Input(
                    "token_budget",
                    default=0,
                    min=0,
                    max=MOST_TOKENS,
                    optional=True,
                    advanced=True,
                    tooltip="Most tokens of all pictures together: they get fewer tiles or a lower resolution. 0: no "
                    "limit.",
                ),
                sockets.Fusion.Input(
                    "fusion",
                    optional=True,
                    tooltip="From UniFusion Load Model: keeps the layers that this model reads, where they are not "
                    "every third.",
                ),
            ],
            outputs=[
                sockets.Hidden.Output(display_name="hidden", tooltip="States of every tapped layer, to LAP Encode."),
                io.String.Output(display_name="text", tooltip="What the VLM wrote."),
                io.String.Output(
                    display_name="record",
                    tooltip="The rewrite with its tokens and settings, as JSON. Given as text, it is replayed exactly. "
                    "Empty if the VLM wrote nothing.",
                ),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    @within_limits
    def execute(
        cls,
        vlm,
        prompt,
        max_tiles,
        sampling=None,
        max_new_tokens=128,
        images=None,
        text="",
        system_prompt="",
        profile=NO_PROFILE,
        think="keep",
        think_tokens=256,
        protect_quotes=False,
        token_budget=0,
        fusion=None,
    ) -> io.NodeOutput:
        from ..unifusion_core.conditioning.verifi import Rewrite as Record
        from ..unifusion_core.conditioning.verifi import is_record, replay, rewrite
        from ..unifusion_core.conditioning.vlm import Request

        pictures = [picture for batch in (images or {}).values() if batch is not None for picture in to_pil(batch)]
        chosen = PROFILES.get(profile)
        plain = not text.strip() and sampling["sampling"] == "off"
        if not prompt.strip() and not (plain and chosen):
            raise ValueError("the prompt is empty; say what the picture should show, or how it should change")
        request = Request(
            prompt,
            tuple(pictures),
            system=system_prompt.strip() or None,
            max_tiles=max_tiles,
            token_budget=token_budget or None,
            template=chosen.template_for(prompt, len(pictures)) if plain and chosen else None,
            image_label=chosen.image_label if plain and chosen else "",
        )
        ready = reading(vlm, chosen, fusion, ", or leave fusion out")
        most = max_new_tokens + (think_tokens if think == "limit" else 0)
        progress = _Progress(most, ready.count_tokens(request))
        record = None
        if is_record(text):
            record = Record.from_json(text)
            hidden = replay(ready, [request], [record])
        elif text.strip():
            hidden = replay(ready, [request], [ready.tokenizer(text.strip(), add_special_tokens=False).input_ids])
        elif plain:
            hidden = ready.encode([request], reuse=True)
        else:
            rewrites = rewrite(
                ready,
                [request],
                max_new_tokens=max_new_tokens,
                think=think_tokens if think == "limit" else think,
                protect_quotes=protect_quotes,
                on_token=progress,
                **{key: sampling[key] for key in ("temperature", "top_p", "seed") if key in sampling},
            )
            hidden, (record,) = rewrites.hidden_states, rewrites.results
        written = record.text if record else text.strip() or prompt
        return io.NodeOutput(hidden.to("cpu"), written, record.to_json() if record else "", ui=ui.PreviewText(written))


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
                    options=list(KEEP),
                    default="image + rewrite",
                    advanced=True,
                    tooltip="The paper keeps tokens of pictures and of the rewrite; where nothing was rewritten, those "
                    "that the model was trained on stand in. User turn: pictures and prompt, as in Krea 2. Think: a "
                    "thinking VLM's thoughts. All: all but the system prompt and what stands before the pictures. "
                    "Everything: those too, for UniFusion Select Tokens to choose from.",
                ),
            ],
            outputs=[io.Conditioning.Output(display_name="pooled", tooltip="To UniFusion Refine.")],
        )

    @classmethod
    @within_limits
    def execute(cls, fusion, hidden, tokens="image + rewrite") -> io.NodeOutput:
        check_layers(fusion.spec, hidden.layers)
        present = {span.kind for row in hidden.spans for span in row}
        if tokens == "image + rewrite" and "rewrite" not in present:  # nothing was written: the prompt stands in
            profile = PROFILES.get(fusion.spec.profile)
            hidden = hidden.select(*(profile.kinds if profile else ("image", "thumbnail", "instruction")))
        elif tokens != "everything":
            hidden = hidden.keep(tokens)
        return io.NodeOutput(pooled(fusion, hidden))


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
            outputs=[
                io.Conditioning.Output(display_name="negative", tooltip="One token; of Krea 2, its empty prompt.")
            ],
        )

    @classmethod
    @within_limits
    def execute(cls, vlm, fusion) -> io.NodeOutput:
        from ..unifusion_core.conditioning.vlm import Request

        ready, profile = reading(vlm, None, fusion), PROFILES.get(fusion.spec.profile)
        if profile is None:
            hidden = ready.encode_empty()
        else:  # the model was trained on an empty prompt of its own
            request = Request("", template=profile.template_for(""))
            hidden = ready.encode([request]).select(*profile.kinds)
        return io.NodeOutput([refined(fusion, entry) for entry in pooled(fusion, hidden)])


def pooled(fusion, hidden) -> list:
    """Hidden states → CONDITIONING, by LAP or what stands in its place in this model."""
    spec = fusion.spec
    return sockets.from_pooled(fusion.ready().pool(hidden).to("cpu"), spec.name, spec.refiner_place == "before")


def check_layers(spec, layers: tuple[int, ...]) -> None:
    """Raises ValueError where hidden states lack layers that a model reads."""
    if lacking := [str(layer) for layer in spec.layers if layer not in layers]:
        raise ValueError(
            f"model {spec.name!r} is conditioned by {describe(spec)}, but hidden lacks layer {', '.join(lacking)} of "
            f"the VLM (it holds {', '.join(map(str, layers))}): connect fusion of UniFusion Load Model to fusion of "
            "UniFusion Rewrite as well"
        )


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


def reading(vlm, profile, fusion, otherwise=""):
    """The VLM on its device, with the taps that a profile or a model asks for beside those of an adapter.

    otherwise: what else helps against a fusion that belongs to another VLM.
    """
    spec = fusion and fusion.spec
    if spec and spec.vlm not in (None, vlm.vlm.identity):
        raise ValueError(
            f"fusion is of {spec.name!r}, which was trained on the VLM {spec.vlm}, but vlm is {vlm.vlm.identity}; load "
            f"the VLM that belongs to the model{otherwise}"
        )
    if profile:
        check_profile(vlm.vlm, profile)
    if not (spec or profile):
        return vlm.ready()
    asked = [each.layers for each in (spec, profile) if each]
    return vlm.ready().tapping(sorted({*vlm.adapter_layers}.union(*asked)))


def check_profile(vlm, profile) -> None:
    """Raises ValueError unless the VLM is large enough to be that of a profile."""
    if vlm.width != profile.width or vlm.num_layers < profile.layers[-1]:
        raise ValueError(
            f"profile {profile.name}: {profile.title} is conditioned on {profile.encoder}, but this VLM is "
            f"{vlm.identity}; load {profile.encoder}, or set profile to {NO_PROFILE}"
        )


def to_pil(batch: torch.Tensor) -> list[Image.Image]:
    """IMAGE [B, H, W, 3] in 0..1 → pictures; a fourth channel counts as alpha over white."""
    pixels = batch.detach().float().cpu()
    if pixels.shape[-1] == 4:
        pixels = pixels[..., :3] * pixels[..., 3:] + 1 - pixels[..., 3:]
    return [Image.fromarray(image.numpy()) for image in (pixels.clamp(0, 1) * 255).round().byte()]


class _Progress:
    """Shows on the node how many tokens there are and the text as it grows; lets a user cancel between two tokens."""

    def __init__(self, most: int, counts: dict) -> None:
        self.bar, self.done = comfy.utils.ProgressBar(most), 0
        self.context, self.server = get_executing_context(), PromptServer.instance
        kinds = ", ".join(f"{kind} {count}" for kind, count in counts["kinds"].items())
        self.heading = f"{counts['total']} tokens: {kinds}"
        self._show(self.heading)

    def __call__(self, row: int, token: int, text: str) -> None:
        self.done += 1
        self.bar.update_absolute(self.done)
        throw_exception_if_processing_interrupted()  # the bar asks only every tenth of a second
        self._show(f"{self.heading}\n\n{text}")

    def _show(self, text: str) -> None:
        if self.context is not None and self.server is not None:
            self.server.send_progress_text(text, self.context.node_id)


NODES = [Rewrite, LAPEncode, Refine, EmptyConditioning]
