"""Specs of whole models, by name; no weights."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from .conditioning.lap import LAPSpec
from .conditioning.pooling import PoolingSpec, pooling_spec
from .conditioning.profiles import PROFILES
from .conditioning.refiner import RefinerSpec
from .diffusion.dit import DiTSpec
from .diffusion.flow import size_shift

RefinerPlace = Literal["after", "before", "none"]
KREA2_MU = 1.15


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The trained half of a model, and what of the VLM it was trained on.

    vlm: `FrozenVLM.identity` of the VLM; None where no weights fix it yet. layers: tapped, as `FrozenVLM.layers`.
    lap: LAP, or the rival of `conditioning.pooling` that stands in its place.
    refiner_place: after LAP (the paper's Sec. 4), before it on every layer (its Sec. 3), or none.
    shift, steps, guidance, size (width and height in px): what sampling uses unless told otherwise.
    shift_by_size: (mu, mu, tokens, tokens), two points of the line of `flow.size_shift`; it then decides, not `shift`.
    profile: key of `conditioning.profiles.PROFILES` whose chat text and tokens a plain prompt, and the empty one, take;
        None: the VLM's own chat template and the instruction's tokens.
    preview: [C + 1][3], colours in -1..1 of one unit of each latent channel and, last, of none; for live previews.
    """

    name: str
    vlm: str | None = None
    layers: tuple[int, ...]
    lap: PoolingSpec
    refiner: RefinerSpec
    dit: DiTSpec
    refiner_place: RefinerPlace = "after"
    shift: float = 1.0
    steps: int = 20
    shift_by_size: tuple[float, float, int, int] | None = None
    profile: str | None = None
    guidance: float = 2.5
    size: tuple[int, int] = (64, 64)
    preview: tuple[tuple[float, float, float], ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "size", tuple(self.size))
        if self.shift_by_size is not None:
            object.__setattr__(self, "shift_by_size", tuple(self.shift_by_size))
            if len(self.shift_by_size) != 4 or self.shift_by_size[2] == self.shift_by_size[3]:
                raise ValueError(f"shift_by_size must be two mu and two numbers of tokens, got {self.shift_by_size}")
        if self.profile is not None and self.profile not in PROFILES:
            raise ValueError(f"profile must be one of {', '.join(PROFILES)} or None, got {self.profile!r}")
        if self.preview is not None:
            object.__setattr__(self, "preview", tuple(tuple(row) for row in self.preview))
            if len(self.preview) != self.dit.in_channels + 1 or any(len(row) != 3 for row in self.preview):
                raise ValueError(f"preview must be {self.dit.in_channels + 1} rows of 3 numbers")
        if len(self.layers) != self.lap.num_layers:
            raise ValueError(f"{len(self.layers)} layers are tapped but LAP pools {self.lap.num_layers}")
        if not self.lap.width == self.refiner.width == self.dit.condition_width:
            widths = self.lap.width, self.refiner.width, self.dit.condition_width
            raise ValueError(f"LAP, refiner and DiT must agree on the VLM's width, got {widths}")
        if self.lap.slots != self.dit.slots:
            raise ValueError(
                f"{self.lap.kind!r} makes {self.lap.slots} vectors of a token, but a DiT of depth {self.dit.depth} "
                f"with injection {self.dit.injection!r} takes {self.dit.slots}"
            )
        if self.refiner_place not in get_args(RefinerPlace):
            raise ValueError(f"refiner_place must be one of {get_args(RefinerPlace)}, got {self.refiner_place!r}")

    def shift_at(self, num_tokens: int) -> float:
        """The factor of `flow.shift_time` for a picture of so many latent tokens."""
        if self.shift_by_size is None:
            return self.shift
        return size_shift(num_tokens, self.shift_by_size[:2], self.shift_by_size[2:])


def spec_to_dict(spec: ModelSpec) -> dict[str, Any]:
    return asdict(spec)


def spec_from_dict(data: dict[str, Any]) -> ModelSpec:
    """The spec that a checkpoint's header holds.

    Raises:
        ValueError: fields are missing or unknown, as in a file of another version.
    """
    try:
        parts = {
            "lap": pooling_spec(data["lap"]),
            "refiner": RefinerSpec(**data["refiner"]),
            "dit": DiTSpec(**data["dit"]),
        }
        return ModelSpec(**{**data, **parts})
    except (KeyError, TypeError) as error:
        raise ValueError(f"the header's spec does not describe a UniFusion model: {error}") from None


def micro() -> ModelSpec:
    """Our own toy model, trained in the micro-world on a CPU."""
    layers, width = (2, 5, 8, 11), 128
    return ModelSpec(
        name="micro",
        layers=layers,
        lap=LAPSpec(num_layers=len(layers), width=width, num_heads=4, intermediate_size=256),
        refiner=RefinerSpec(width=width, num_heads=4, intermediate_size=256),
        dit=DiTSpec(
            in_channels=8,
            patch_size=2,
            depth=6,
            num_heads=6,
            head_dim=32,
            intermediate_size=512,
            timestep_dim=128,
            condition_width=width,
            axes_dim=(8, 12, 12),
            image_positions="source",
        ),
    )


def krea2() -> ModelSpec:
    """Krea 2's base model by its public sizes: 12.8 B parameters, fed by Qwen3-VL-4B.

    Its steps, guidance and shift are those of diffusers' pipeline: mu runs from 0.5 at 256 latent tokens to 1.15 at
    6400, and guidance 4.5 there, v + s (v - u), is s + 1 = 5.5 here, u + s (v - u). ComfyUI's core takes mu = 1.15 at
    every size, which `shift` says.
    """
    width, mlp = 2560, 6912
    return ModelSpec(
        name="krea2",
        layers=PROFILES["krea2"].layers,
        lap=LAPSpec(num_layers=12, width=width, num_heads=20, num_kv_heads=20, intermediate_size=mlp),
        refiner=RefinerSpec(width=width, num_heads=20, num_kv_heads=20, intermediate_size=mlp),
        dit=DiTSpec(
            in_channels=16,
            patch_size=2,
            depth=28,
            num_heads=48,
            num_kv_heads=12,
            head_dim=128,
            intermediate_size=16384,
            condition_width=width,
            axes_dim=(32, 48, 48),
        ),
        shift=math.exp(KREA2_MU),
        shift_by_size=(0.5, KREA2_MU, 256, 6400),
        profile="krea2",
        steps=28,
        guidance=5.5,
        size=(1024, 1024),
    )


def krea2_turbo() -> ModelSpec:
    """Krea 2's distilled model: the same sizes, 8 steps, one shift at every size, no guidance (0 there is 1 here)."""
    return replace(krea2(), name="krea2-turbo", shift_by_size=None, steps=8, guidance=1.0)


def unifusion_5b() -> ModelSpec:
    """The paper's ablations by size (Sec. 2.2): a DiT of 5B parameters on InternVL2.5-8B; no weights exist.

    Departs: depth and widths are ours. Llama-3.1-8B, its text-only encoder, has the same width and number of layers.
    """
    spec = _large("unifusion-5b", width=4096, num_layers=32, heads=32, intermediate=10752)
    return replace(spec, dit=replace(spec.dit, depth=40, num_heads=24, intermediate_size=8192), size=(512, 512))


def unifusion_8b() -> ModelSpec:
    """The paper's model by size: InternVL3-8B and a DiT of 8B parameters; no weights exist.

    Departs: the paper gives neither heads nor widths of LAP, refiner and DiT; these are ours.
    """
    return _large("unifusion-8b", width=3584, num_layers=28, heads=28, intermediate=9472)


def unifusion_8b_gemma3_12b() -> ModelSpec:
    """The paper's App. A.1.4: the same DiT on Gemma-3-12B; no weights exist."""
    return _large("unifusion-8b-gemma3-12b", width=3840, num_layers=48, heads=30, intermediate=10240)


def _large(name: str, *, width: int, num_layers: int, heads: int, intermediate: int) -> ModelSpec:
    layers = tuple(range(2, num_layers + 1, 3))
    return ModelSpec(
        name=name,
        layers=layers,
        lap=LAPSpec(num_layers=len(layers), width=width, num_heads=heads, intermediate_size=intermediate),
        refiner=RefinerSpec(width=width, num_heads=heads, intermediate_size=intermediate),
        dit=DiTSpec(
            in_channels=32,
            patch_size=2,
            depth=36,
            num_heads=32,
            head_dim=128,
            intermediate_size=11008,
            condition_width=width,
            axes_dim=(32, 48, 48),
        ),
        shift=3.0,
        steps=50,
        guidance=4.5,
        size=(1024, 1024),
    )


PRESETS = {
    "micro": micro,
    "krea2": krea2,
    "krea2-turbo": krea2_turbo,
    "unifusion-5b": unifusion_5b,
    "unifusion-8b": unifusion_8b,
    "unifusion-8b-gemma3-12b": unifusion_8b_gemma3_12b,
}
