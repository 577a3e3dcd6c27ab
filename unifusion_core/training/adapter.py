"""A LAP in front of somebody else's frozen DiT: it starts as exactly the conditioning that the DiT was trained with.

The host reads one layer of its VLM, or a few side by side; the adapter gives every such slot a LAP over many layers,
whose blocks add nothing at first and whose projector takes that one layer alone. Only the LAPs are trained.
B batch, T tokens, L tapped layers, E VLM width, S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..checkpoint import load_checkpoint, load_into, save_checkpoint
from ..conditioning.hidden_states import HiddenStates
from ..conditioning.lap import LAPSpec, LayerwiseAttentionPooling
from ..conditioning.profiles import PROFILES, EncoderProfile
from ..conditioning.vlm import FrozenVLM, Request
from ..diffusion import flow
from .asked import Asked, Kind, Teacher
from .feed import MicroBatch
from .samples import Damaged, Texts

KIND = "lap-adapter"  # in the header of a file, beside the fields of the spec
Host = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
"""host(latents [B, C, h, w], t [B], tokens [B, T, S E], mask [B, T] or None) → velocity [B, C, h, w] (`hosts.py`)."""


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """profile: of the host, in `conditioning.profiles`; layers: tapped, among them the profile's; vlm: its identity."""

    profile: str
    layers: tuple[int, ...]
    lap: LAPSpec
    vlm: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if self.profile not in PROFILES:
            raise ValueError(f"profile {self.profile!r}: expected one of {', '.join(PROFILES)}")
        if missing := [layer for layer in self.host.layers if layer not in self.layers]:
            raise ValueError(
                f"layers {self.layers} lack {missing}, which {self.host.title} was trained on; tap them too"
            )
        if self.lap.num_layers != len(self.layers):
            raise ValueError(f"{len(self.layers)} layers are tapped but LAP pools {self.lap.num_layers}")

    @property
    def host(self) -> EncoderProfile:
        return PROFILES[self.profile]


def adapter_spec(profile: str, num_layers: int, width: int, *, heads: int, intermediate_size: int) -> AdapterSpec:
    """Every third layer of the VLM, as in the paper, and those of the host."""
    if profile not in PROFILES:
        raise ValueError(f"profile {profile!r}: expected one of {', '.join(PROFILES)}")
    layers = tuple(sorted({*range(2, num_layers + 1, 3), *PROFILES[profile].layers}))
    lap = LAPSpec(num_layers=len(layers), width=width, num_heads=heads, intermediate_size=intermediate_size)
    return AdapterSpec(profile=profile, layers=layers, lap=lap)


class LAPAdapter(nn.Module):
    """States [B, T, L, E] → what the host reads [B, T, S E]; the original, to the bit, until it is trained."""

    def __init__(self, spec: AdapterSpec) -> None:
        super().__init__()
        self.spec = spec
        self.laps = nn.ModuleList(LayerwiseAttentionPooling(spec.lap) for _ in spec.host.layers)

    @torch.no_grad()
    def init_weights(self) -> None:
        for lap, layer in zip(self.laps, self.spec.host.layers, strict=True):
            lap.init_weights()
            for block in lap.blocks:
                nn.init.zeros_(block.attn.to_out.weight)
                nn.init.zeros_(block.ff.down.weight)
            lap.projector.weight.zero_()
            lap.projector.weight[0, self.spec.layers.index(layer)] = 1

    def forward(self, states: Tensor) -> Tensor:
        slots = torch.stack([lap(states) for lap in self.laps], dim=2)
        return (slots.transpose(2, 3) if self.spec.host.order == "width-first" else slots).flatten(2)


def host_states(hidden: HiddenStates, profile: EncoderProfile, final_norm: nn.Module | None) -> Tensor:
    """The states with the VLM's final norm on the tap where the host had it."""
    if not profile.post_norm:
        return hidden.states
    at, states = hidden.layers.index(profile.layers[-1]), hidden.states.clone()
    states[:, :, at] = final_norm(states[:, :, at])
    return states


class HostTeacher(Teacher):
    """Asks the VLM as the host's own pipeline does: the whole chat text of a caption, no rewrite.

    Departs: VERIFI's tokens are left to inference; the host has never seen a conversation go on.
    """

    def __init__(self, vlm: FrozenVLM, spec: AdapterSpec, tiles: Sequence[int] = (1,)) -> None:
        super().__init__(vlm, tiles)
        self.profile = spec.host

    def ask(self, kind: Kind, texts: Texts, picture: Image.Image | None, rng: Random) -> Asked:
        if kind in ("picture", "joint", "edit") and self.profile.images == "none":
            raise Damaged(f"{self.profile.encoder} sees no pictures; train on text alone (--mix 1,0,0)")
        prompt = {"empty": "", "picture": "", "edit": texts.instruction}.get(kind, texts.caption or texts.instruction)
        images = () if kind in ("text", "empty") else (picture,)
        template = self.profile.template_for(prompt, len(images))
        request = Request(prompt, images, template=template, image_label=self.profile.image_label)
        return Asked(kind, replace(request, max_tiles=rng.choice(self.tiles)))

    def states(self, rows: Sequence[Asked]) -> tuple[Tensor, Tensor, Tensor]:
        with self._lock:
            hidden = self.vlm.encode([row.request for row in rows]).select(*self.profile.kinds)
        norm = self.vlm.final_norm if self.profile.post_norm else None
        with torch.no_grad():
            return host_states(hidden, self.profile, norm), hidden.mask, hidden.positions


class AdapterTrainee(nn.Module):
    """The adapter before its frozen host, which is no parameter of it."""

    def __init__(self, adapter: LAPAdapter, host: Host, compute: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.adapter, self.compute = adapter, compute
        self._host = [host]

    @property
    def units(self) -> list[nn.Module]:
        return list(self.adapter.laps)

    def forward(self, batch: MicroBatch) -> Tensor:
        """Mean squared error of the host's velocity of each row [B], float32."""
        x = flow.x_t(batch.latents, batch.noise, batch.t)
        with torch.autocast(x.device.type, self.compute, enabled=self.compute != torch.float32):
            states = batch.states if self.compute != torch.float32 else batch.states.float()
            velocity = self._host[0](x, batch.t, self.adapter(states), batch.mask)
        error = velocity.float() - flow.velocity_target(batch.latents, batch.noise)
        return error.square().flatten(1).mean(1)


def save_adapter(path: str | Path, adapter: LAPAdapter, tensors: dict[str, Tensor] | None = None) -> None:
    """One safetensors file with the spec in its header. tensors: instead of the adapter's own, as their average."""
    save_checkpoint(path, tensors or adapter.state_dict(), {"kind": KIND, **asdict(adapter.spec)})


def load_adapter(path: str | Path, device: torch.device | str = "cpu") -> LAPAdapter:
    """Loads an adapter.

    Raises:
        ValueError: the file is missing or damaged, or holds no adapter.
    """
    data, tensors = load_checkpoint(path, device)
    adapter = LAPAdapter(_spec(path, data)).to(device)
    load_into(adapter, tensors, name=str(path))
    return adapter.eval().requires_grad_(False)


def _spec(path: str | Path, data: dict[str, Any]) -> AdapterSpec:
    if data.get("kind") != KIND:
        raise ValueError(f"{path}: holds no LAP adapter; give a file that `save_adapter` wrote")
    try:
        fields = {name: value for name, value in data.items() if name != "kind"}
        return AdapterSpec(**{**fields, "lap": LAPSpec(**fields["lap"])})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: its header does not describe a LAP adapter: {error}") from None
