"""How public DiTs take the states of a VLM: which layers, in which order, of which tokens of which chat text.

A profile makes from `HiddenStates` what the encoder of that DiT would have made, so that VERIFI, a choice of tokens and
schedules work with it as it is. The chat texts are those of the released pipelines: a DiT understands no others.
B batch, T tokens, L tapped layers, E VLM width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from .hidden_states import KEEP, HiddenStates, SpanKind

if TYPE_CHECKING:
    from .adapter import LAPAdapter

DESCRIBE = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:"
)
EDIT = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how "
    "the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate."
)
BOOGU = (
    "You are a helpful assistant that generates high-quality images based on user instructions. The instructions are "
    "as follows."
)
_ASSISTANT = "<|im_start|>assistant\n"


def _turns(system: str = "", images: bool = False, reply: str = _ASSISTANT) -> str:
    """Chat text in the ChatML of Qwen, with the slots of `Request.template`."""
    opening = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    return f"{opening}<|im_start|>user\n{'{images}' if images else ''}{{prompt}}<|im_end|>\n{reply}"


KREA2_SYSTEM = DESCRIBE
KREA2_TEMPLATE = _turns(KREA2_SYSTEM)

# The whole chat text of a plain prompt, and nothing that the VLM wrote.
WHOLE_PROMPT: tuple[SpanKind, ...] = ("prefix", "system", "instruction", "image", "thumbnail", "marker")


@dataclass(frozen=True, kw_only=True)
class EncoderProfile:
    """Says how one DiT was conditioned.

    Args:
        name, title: for code and for people.
        encoder: the VLM it was trained with; `families` are the model types that `HiddenStates.vlm` may begin with.
        layers: tapped indices, as everywhere in this package; `width` is E.
        order: "layers-first" joins whole layers, [T, L * E]; "width-first" the layers of each channel, [T, E * L].
        post_norm: the VLM's final norm lies on the last tap.
        template, template_images: chat text without and with pictures; `template_empty` that of no prompt, if another.
        image_label: goes before each picture, {n} counting from 1, for `Request.image_label`.
        keep: the tokens of a plain prompt that reach the DiT, a mode of `KEEP` or kinds of spans.
        images: "trained", "untrained" (the DiT never saw image tokens) or "none" (nor does its encoder see pictures).
        mask: "needed" (the DiT counts its tokens by it), "padding" (only where there is padding) or "unread".
        pad_to: the DiT was trained with its tokens filled up to this number.
        note: what else a user should know.
    """

    name: str
    title: str
    encoder: str
    families: tuple[str, ...]
    layers: tuple[int, ...]
    width: int
    order: Literal["layers-first", "width-first"] = "layers-first"
    post_norm: bool = False
    template: str
    template_images: str
    template_empty: str | None = None
    image_label: str = ""
    keep: str | tuple[SpanKind, ...] = "user turn"
    images: Literal["trained", "untrained", "none"] = "untrained"
    mask: Literal["needed", "padding", "unread"] = "padding"
    pad_to: int = 0
    note: str = ""

    @property
    def kinds(self) -> tuple[SpanKind, ...]:
        """The kinds of spans that `keep` means."""
        return KEEP[self.keep] if isinstance(self.keep, str) else self.keep

    def template_for(self, prompt: str, images: int = 0) -> str:
        """Returns the chat text of a plain prompt, for `Request.template`."""
        if images:
            return self.template_images
        return self.template if prompt.strip() or self.template_empty is None else self.template_empty


_KREA2 = EncoderProfile(
    name="krea2",
    title="Krea 2",
    encoder="Qwen3-VL-4B",
    families=("qwen3_vl",),
    layers=tuple(range(2, 36, 3)),
    width=2560,
    template=KREA2_TEMPLATE,
    template_images=_turns(KREA2_SYSTEM, images=True),
    mask="unread",
)
_BOOGU = EncoderProfile(
    name="boogu",
    title="Boogu-Image",
    encoder="Qwen3-VL-8B",
    families=("qwen3_vl",),
    layers=(36,),
    width=4096,
    post_norm=True,
    template=_turns(BOOGU, reply=""),
    template_images=_turns(EDIT, images=True, reply=""),
    template_empty=_turns(EDIT, reply=""),
    keep=WHOLE_PROMPT,
    mask="needed",
)
_QWEN_IMAGE = EncoderProfile(
    name="qwen-image",
    title="Qwen-Image",
    encoder="Qwen2.5-VL-7B",
    families=("qwen2_5_vl",),
    layers=(28,),
    width=3584,
    post_norm=True,
    template=_turns(DESCRIBE),
    template_images=_turns(EDIT, images=True),
)
_KLEIN_4B = EncoderProfile(
    name="klein-4b",
    title="FLUX.2 Klein 4B",
    encoder="Qwen3-4B",
    families=("qwen3",),
    layers=(9, 18, 27),
    width=2560,
    template=_turns(reply=f"{_ASSISTANT}<think>\n\n</think>\n\n"),
    template_images=_turns(images=True, reply=f"{_ASSISTANT}<think>\n\n</think>\n\n"),
    keep=WHOLE_PROMPT,
    images="none",
    mask="unread",
    pad_to=512,
    note="It was trained with the states of padding up to 512 tokens; here zeros take their place.",
)

PROFILES: dict[str, EncoderProfile] = {
    profile.name: profile
    for profile in (
        _KREA2,
        _BOOGU,
        replace(_BOOGU, name="boogu-edit", title="Boogu-Image Edit", images="trained"),
        _QWEN_IMAGE,
        replace(_QWEN_IMAGE, name="qwen-image-edit", title="Qwen-Image-Edit", images="trained"),
        replace(
            _QWEN_IMAGE,
            name="qwen-image-edit-2509",
            title="Qwen-Image-Edit 2509 and later",
            template=_turns(EDIT),
            image_label="Picture {n}: ",
            images="trained",
        ),
        EncoderProfile(
            name="ideogram4",
            title="Ideogram 4",
            encoder="Qwen3-VL-8B",
            families=("qwen3_vl", "qwen3"),  # its release holds the language part alone
            layers=(*range(1, 35, 3), 36),
            width=4096,
            order="width-first",
            template=_turns(),
            template_images=_turns(images=True),
            keep=WHOLE_PROMPT,
        ),
        _KLEIN_4B,
        replace(_KLEIN_4B, name="klein-9b", title="FLUX.2 Klein 9B", encoder="Qwen3-8B", width=4096),
        EncoderProfile(
            name="z-image",
            title="Z-Image",
            encoder="Qwen3-4B",
            families=("qwen3",),
            layers=(35,),
            width=2560,
            template=_turns(),
            template_images=_turns(images=True),
            keep=WHOLE_PROMPT,
            images="none",
        ),
    )
}


def flatten(states: Tensor, profile: EncoderProfile) -> Tensor:
    """Joins the taps of each token in the order that the profile's DiT reads: [B, T, L, E] -> [B, T, L * E].

    Raises:
        ValueError: another number of taps or another width than the profile's.
    """
    expected = len(profile.layers), profile.width
    if states.ndim != 4 or tuple(states.shape[2:]) != expected:
        raise ValueError(
            f"states of shape {tuple(states.shape)}: {profile.title} takes [B, T, {expected[0]}, {expected[1]}], the "
            f"layers {profile.layers} of {profile.encoder}"
        )
    ordered = states.transpose(2, 3) if profile.order == "width-first" else states
    return ordered.flatten(2)


def condition_for(
    hidden: HiddenStates,
    profile: EncoderProfile,
    keep: str | None = None,
    final_norm: Callable[[Tensor], Tensor] | None = None,
    adapter: LAPAdapter | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Makes the conditioning that the encoder of the profile's DiT would have made of these tokens.

    Args:
        hidden: taps of at least the profile's layers.
        keep: a mode of `KEEP`; None = what the DiT was trained on, of which a rewrite is no part.
        final_norm: `FrozenVLM.final_norm`, where `profile.post_norm` asks for it.
        adapter: makes the slots of the profile's layers out of its own.
    Returns:
        tokens: [B, T, L * E] float32 on the states' device; padding is zero.
        mask: [B, T] bool, True where a real token stands; None where the DiT needs none.
    Raises:
        ValueError: a layer is missing, another width, no final norm where one is needed, an unknown mode, no such
            token, rows of different lengths for a DiT that reads no mask, or states that the adapter does not read.
    """
    check(hidden, profile, adapter)
    if profile.post_norm and final_norm is None:
        raise ValueError(f"{profile.title} was trained behind the VLM's final norm: connect vlm, the one that wrote")
    chosen = hidden.select(*kinds_of(profile, keep))
    if adapter is None:
        states = host_states(chosen.tapping(profile.layers).to(dtype=torch.float32), profile, final_norm)
    else:
        states = adapter.read(chosen, final_norm)
    tokens, mask = flatten(states, profile), chosen.mask
    missing = profile.pad_to - tokens.shape[1]
    if missing > 0:
        tokens = torch.nn.functional.pad(tokens, (0, 0, 0, missing))
    if profile.mask == "unread":
        if not profile.pad_to and not mask.all():
            raise ValueError(
                f"rows of {mask.sum(1).tolist()} tokens: {profile.title} reads no mask; encode one prompt at a time"
            )
        return tokens, None
    return tokens, mask if profile.mask == "needed" or not mask.all() else None


def host_states(hidden: HiddenStates, profile: EncoderProfile, final_norm: Callable[[Tensor], Tensor] | None) -> Tensor:
    """The states with the VLM's final norm on the tap where the profile's DiT had it in training."""
    if not profile.post_norm:
        return hidden.states
    at, states = hidden.layers.index(profile.layers[-1]), hidden.states.clone()
    states[:, :, at] = final_norm(states[:, :, at])
    return states


def check(hidden: HiddenStates, profile: EncoderProfile, adapter: LAPAdapter | None = None) -> None:
    """Says what is wrong with the states for this profile, and for an adapter, where there is one.

    Raises:
        ValueError: the states lack a layer of the profile, or have another width, or the adapter does not read them.
    """
    if adapter is not None:
        adapter.check(hidden, profile)
    width = hidden.states.shape[-1]
    if width != profile.width:
        raise ValueError(
            f"states of width {width} from {hidden.vlm}: {profile.title} takes width {profile.width}, of "
            f"{profile.encoder}; load that VLM"
        )
    if missing := [layer for layer in profile.layers if layer not in hidden.layers]:
        raise ValueError(
            f"the states are of layers {hidden.layers} and lack {missing}: {profile.title} takes {profile.layers}; set "
            f"profile of UniFusion Rewrite to {profile.name}"
        )


def doubts(hidden: HiddenStates, profile: EncoderProfile, keep: str | None = None) -> list[str]:
    """Returns what the DiT was not trained for, as sentences for the user; empty if all is as in training."""
    kinds = kinds_of(profile, keep)
    present = {span.kind for row in hidden.spans for span in row}
    found = []
    if profile.images != "trained" and present & {"image", "thumbnail"} & set(kinds):
        blind = f", and {profile.encoder} sees no pictures" if profile.images == "none" else ""
        found.append(f"{profile.title} was not trained on image tokens{blind}: their effect is a matter of luck")
    if not hidden.vlm.startswith(tuple(f"{family}-" for family in profile.families)):
        found.append(f"the states come from {hidden.vlm}, but {profile.title} was trained on {profile.encoder}")
    if keep is None and "rewrite" in present:
        found.append("the rewrite is left out: set tokens to rewrite or image + rewrite to be guided by it")
    return found


def kinds_of(profile: EncoderProfile, keep: str | None) -> tuple[SpanKind, ...]:
    """Returns the kinds of spans that a mode keeps; None is the profile's own choice."""
    if keep is None:
        return profile.kinds
    if keep not in KEEP:
        raise ValueError(f"keep {keep!r}: expected one of {', '.join(KEEP)}, or None for what {profile.title} takes")
    return KEEP[keep]
