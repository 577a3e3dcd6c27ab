"""A LAP in front of somebody else's frozen DiT: it starts as exactly the conditioning that the DiT was trained with.

The host reads one layer of its VLM, or a few side by side; the adapter gives every such slot a LAP over many layers,
whose blocks add nothing at first and whose projector takes that one layer alone. Only the LAPs are trained.
B batch, T tokens, L tapped layers, E VLM width, S slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checkpoint import load_checkpoint, load_into, save_checkpoint
from .hidden_states import HiddenStates
from .lap import LAPSpec, LayerwiseAttentionPooling
from .profiles import PROFILES, EncoderProfile, host_states

if TYPE_CHECKING:
    from .vlm import FrozenVLM

KIND = "lap-adapter"  # in the header of a file, beside the fields of the spec


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


def adapter_spec(
    profile: str, num_layers: int, width: int, *, heads: int | None = None, intermediate_size: int | None = None
) -> AdapterSpec:
    """Every third layer of the VLM, as in the paper, and those of the host.

    heads, intermediate_size: None = heads of 128 and 8/3 of the width in steps of 256, as Krea 2's LAP has.
    """
    if profile not in PROFILES:
        raise ValueError(f"profile {profile!r}: expected one of {', '.join(PROFILES)}")
    layers = tuple(sorted({*range(2, num_layers + 1, 3), *PROFILES[profile].layers}))
    heads = heads or max(1, width // 128)
    intermediate_size = intermediate_size or max(1, round(width / 96)) * 256
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
        slots = self.slots(states)
        return (slots.transpose(2, 3) if self.spec.host.order == "width-first" else slots).flatten(2)

    def slots(self, states: Tensor) -> Tensor:
        """States [B, T, L, E] → what stands in for each of the host's own layers [B, T, S, E]."""
        return torch.stack([lap(states) for lap in self.laps], dim=2)

    @torch.no_grad()
    def read(self, hidden: HiddenStates, final_norm: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """As `slots`, of states that may have more layers; float32 where they lie, and padding stays zero."""
        taps = hidden.tapping(self.spec.layers).to(dtype=torch.float32)
        states, like = host_states(taps, self.spec.host, final_norm), self.laps[0].projector.weight
        return self.slots(states.to(like.device, like.dtype)).to(states)

    def check(self, hidden: HiddenStates, profile: EncoderProfile) -> None:
        """Raises ValueError unless these are states that the adapter reads, for the model that it was trained for.

        The message names what to connect.
        """
        if profile.name != self.spec.profile:
            raise ValueError(
                f"the adapter was trained for {self.spec.host.title}, but profile is {profile.name}; set profile to "
                f"{self.spec.profile} here and at UniFusion Rewrite, or disconnect adapter"
            )
        check_source(self.spec, hidden.vlm, hidden.states.shape[-1])
        if missing := [layer for layer in self.spec.layers if layer not in hidden.layers]:
            raise ValueError(
                f"the states are of layers {hidden.layers} and lack {missing}, which the adapter reads; connect vlm of "
                "UniFusion Load Adapter to UniFusion Rewrite"
            )


def check_source(spec: AdapterSpec, identity: str, width: int) -> None:
    """Raises ValueError unless this is the VLM that the adapter was trained on."""
    if (spec.vlm or identity) != identity:
        raise ValueError(
            f"the adapter was trained on the states of {spec.vlm}, but the VLM is {identity}; connect that VLM to vlm "
            "of UniFusion Load Adapter"
        )
    if width != spec.lap.width:
        raise ValueError(
            f"the adapter reads states of width {spec.lap.width}, but those of {identity} have {width}; connect "
            f"{spec.host.encoder} to vlm of UniFusion Load Adapter"
        )


def tapping(vlm: FrozenVLM, spec: AdapterSpec) -> FrozenVLM:
    """Returns the same VLM, sharing the model, which also taps the layers that the adapter reads.

    Raises:
        ValueError: another VLM than the adapter's.
    """
    check_source(spec, vlm.identity, vlm.width)
    if vlm.num_layers < max(spec.layers):
        raise ValueError(
            f"the adapter reads layer {max(spec.layers)}, but {vlm.identity} has {vlm.num_layers}; connect "
            f"{spec.host.encoder} to vlm of UniFusion Load Adapter"
        )
    return vlm.tapping(sorted({*vlm.layers, *spec.layers}))


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
