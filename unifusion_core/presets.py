"""Specs of whole models, by name; no weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from .conditioning.lap import LAPSpec
from .conditioning.refiner import RefinerSpec
from .diffusion.dit import DiTSpec

RefinerPlace = Literal["after", "before", "none"]


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The trained half of a model, and what of the VLM it was trained on.

    vlm: `FrozenVLM.identity` of the VLM; None where no weights fix it yet. layers: tapped, as `FrozenVLM.layers`.
    refiner_place: after LAP (the paper's Sec. 4), before it on every layer (its Sec. 3), or none.
    shift, steps, guidance, size (width and height in px): what sampling uses unless told otherwise.
    preview: [C + 1][3], colours in -1..1 of one unit of each latent channel and, last, of none; for live previews.
    """

    name: str
    vlm: str | None = None
    layers: tuple[int, ...]
    lap: LAPSpec
    refiner: RefinerSpec
    dit: DiTSpec
    refiner_place: RefinerPlace = "after"
    shift: float = 1.0
    steps: int = 20
    guidance: float = 2.5
    size: tuple[int, int] = (64, 64)
    preview: tuple[tuple[float, float, float], ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "size", tuple(self.size))
        if self.preview is not None:
            object.__setattr__(self, "preview", tuple(tuple(row) for row in self.preview))
            if len(self.preview) != self.dit.in_channels + 1 or any(len(row) != 3 for row in self.preview):
                raise ValueError(f"preview must be {self.dit.in_channels + 1} rows of 3 numbers")
        if len(self.layers) != self.lap.num_layers:
            raise ValueError(f"{len(self.layers)} layers are tapped but LAP pools {self.lap.num_layers}")
        if not self.lap.width == self.refiner.width == self.dit.condition_width:
            widths = self.lap.width, self.refiner.width, self.dit.condition_width
            raise ValueError(f"LAP, refiner and DiT must agree on the VLM's width, got {widths}")
        if self.refiner_place not in get_args(RefinerPlace):
            raise ValueError(f"refiner_place must be one of {get_args(RefinerPlace)}, got {self.refiner_place!r}")


def spec_to_dict(spec: ModelSpec) -> dict[str, Any]:
    return asdict(spec)


def spec_from_dict(data: dict[str, Any]) -> ModelSpec:
    """The spec that a checkpoint's header holds.

    Raises:
        ValueError: fields are missing or unknown, as in a file of another version.
    """
    try:
        parts = {
            "lap": LAPSpec(**data["lap"]),
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


PRESETS = {"micro": micro, "unifusion-8b": unifusion_8b, "unifusion-8b-gemma3-12b": unifusion_8b_gemma3_12b}
