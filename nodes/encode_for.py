"""Hidden states → the CONDITIONING of another model, as its own text encoder would have made it."""

from __future__ import annotations

import logging

from comfy_api.latest import io, ui

from ..unifusion_core.conditioning.hidden_states import KEEP
from ..unifusion_core.conditioning.profiles import PROFILES, check, condition_for, doubts, kinds_of
from . import sockets
from .limits import within_limits

OWN = "profile's own"


class EncodeForModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniFusionEncodeForModel",
            display_name="UniFusion Encode for Model",
            category="UniFusion/conditioning",
            description="Gives Krea 2, Boogu, Qwen-Image, Ideogram 4, FLUX.2 Klein or Z-Image the states of a prompt, "
            "of a rewrite or of pictures, in the order in which that model's own text encoder would have given them.",
            search_aliases=["krea 2", "boogu", "qwen-image", "ideogram", "klein", "z-image", "verifi", "text encode"],
            inputs=[
                sockets.Hidden.Input("hidden", tooltip="From UniFusion Rewrite with the same profile."),
                io.Combo.Input(
                    "profile",
                    options=list(PROFILES),
                    default="krea2",
                    tooltip="The model that will be conditioned. Of these, "
                    f"{_names('trained')} were trained on image tokens; with the others the node warns about them.",
                ),
                io.Combo.Input(
                    "tokens",
                    options=[OWN, *KEEP],
                    default=OWN,
                    tooltip="Which tokens condition the model. Profile's own: those of a plain prompt, as in its "
                    "training. Rewrite: VERIFI. Image + rewrite: the paper's. Image: the first track of a "
                    "zero-shot edit.",
                ),
                sockets.VLM.Input(
                    "vlm",
                    optional=True,
                    tooltip="The VLM that made hidden; needed by Boogu and Qwen-Image, which take its final norm.",
                ),
                sockets.Adapter.Input(
                    "adapter",
                    optional=True,
                    tooltip="From UniFusion Load Adapter, whose vlm must then be at UniFusion Rewrite: the model reads "
                    "what this makes of many layers.",
                ),
            ],
            outputs=[io.Conditioning.Output(tooltip="To a sampler, UniFusion Schedule or core's ReferenceLatent.")],
            has_intermediate_output=True,
        )

    @classmethod
    @within_limits
    def execute(cls, hidden, profile, tokens=OWN, vlm=None, adapter=None) -> io.NodeOutput:
        chosen, keep = PROFILES[profile], None if tokens == OWN else tokens
        check(hidden, chosen, adapter and adapter.adapter)
        norm = _final_norm(vlm, hidden) if chosen.post_norm and vlm is not None else None
        states, mask = condition_for(hidden, chosen, keep, norm, adapter and adapter.ready())
        words = {} if mask is None else {"attention_mask": mask.long().cpu()}
        warnings = doubts(hidden, chosen, keep)
        for warning in warnings:
            logging.warning("UniFusion Encode for Model: %s", warning)
        report = [_counts(hidden, kinds_of(chosen, keep), chosen.title)]
        report += [f"LAP adapter over {len(adapter.adapter.spec.layers)} layers"] if adapter else []
        report += [f"Warning: {warning}." for warning in warnings] + [chosen.note] * bool(chosen.note)
        return io.NodeOutput([[states.cpu(), words]], ui=ui.PreviewText("\n".join(report)))


def _names(images: str) -> str:
    return ", ".join(name for name, profile in PROFILES.items() if profile.images == images)


def _counts(hidden, kinds: tuple[str, ...], title: str) -> str:
    """What is kept, as "Krea 2: 37 tokens (4 image, 33 rewrite)"; of the first row."""
    counted = {kind: sum(len(span) for span in hidden.spans[0] if span.kind == kind) for kind in kinds}
    listed = ", ".join(f"{number} {kind}" for kind, number in counted.items() if number)
    return f"{title}: {sum(counted.values())} tokens ({listed})"


def _final_norm(vlm, hidden):
    ready = vlm.ready()
    if ready.identity != hidden.vlm:
        raise ValueError(f"hidden comes from {hidden.vlm}, but vlm is {ready.identity}; connect the VLM that made it")
    return lambda states: ready.final_norm(states.to(ready.device)).to(states.device)


NODES = [EncodeForModel]
