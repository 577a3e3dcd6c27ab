"""The six boxes in order: VLM → VERIFI → LAP → refiner → DiT → VAE."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .checkpoint import load_checkpoint, load_into, save_checkpoint
from .condition import Condition
from .conditioning.hidden_states import KEEP, HiddenStates, SpanKind
from .conditioning.pooling import build_pooling
from .conditioning.profiles import PROFILES, EncoderProfile
from .conditioning.refiner import Refiner
from .conditioning.verifi import Rewrites, replay, rewrite
from .conditioning.vlm import FrozenVLM, Request, load_vlm
from .diffusion.dit import DiT
from .diffusion.flow import Velocity, timesteps
from .diffusion.sampler import Callback, guided, initial_noise, sample_euler, sample_heun
from .diffusion.schedule import Mix, parse_schedule, resolve, velocity_at
from .fusion import FusionHead, check_vlm
from .krea2 import is_krea2, load_krea2
from .presets import ModelSpec, spec_from_dict, spec_to_dict
from .vaes import AnyVAE, load_vae

WEIGHTS = Path(__file__).parent / "weights"
EMBEDDED = {"micro": "edit", "micro-base": "base"}  # final model (stage 2), and stage 1, which never saw an edit
SAMPLERS = {"euler": sample_euler, "heun": sample_heun}
PICTURE: tuple[SpanKind, ...] = ("image", "thumbnail")
TEMPLATE: tuple[SpanKind, ...] = ("prefix", "system", "marker")
PAPER = "image + rewrite"  # the mode of `KEEP` in Sec. 3
MAX_SIDE = 4096  # px

Sampler = Literal["euler", "heun"]


def tracks_of(kinds: Sequence[SpanKind], images: bool, text: bool = True) -> dict[str, tuple[SpanKind, ...]]:
    """Divides the tokens that reach the DiT into tracks of a schedule: `image`, `text`, and `all` where there are both.

    images, text: whether there are any; what only the chat text brings does not count as text.
    """
    picture = tuple(kind for kind in kinds if kind in PICTURE) if images else ()
    words = tuple(kind for kind in kinds if kind not in PICTURE) if text or not picture else ()
    tracks = {"image": picture, "text": words, "all": tuple(kinds) if picture and words else ()}
    return {name: kinds for name, kinds in tracks.items() if kinds}


@dataclass(frozen=True, eq=False)
class Conditions:
    """What the DiT may be conditioned on, by track (`image`, `text`, `all`), and the rewrites behind it."""

    tracks: Mapping[str, Condition]
    texts: tuple[str, ...] = ()
    rewrites: Rewrites | None = None

    @property
    def default_track(self) -> str:
        return "all" if "all" in self.tracks else next(iter(self.tracks))

    def __len__(self) -> int:
        return len(next(iter(self.tracks.values())))


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything about a sampling but its conditions and its noise."""

    timesteps: Tensor
    mixes: list[Mix]
    guidance: float
    latent_shape: tuple[int, int, int]


class UniFusion:
    """A frozen VLM, the trained LAP, refiner and DiT, and a VAE."""

    def __init__(
        self,
        spec: ModelSpec,
        vlm: FrozenVLM,
        lap: nn.Module,
        refiner: Refiner,
        dit: DiT,
        vae: AnyVAE,
    ) -> None:
        check_vlm(spec, vlm.identity, vlm.layers)
        self.spec, self.vlm, self.vae = spec, vlm, vae
        self.lap, self.refiner, self.dit = lap, refiner, dit
        self.fusion = FusionHead(spec, lap, refiner)
        for module in (lap, refiner, dit, vae):
            module.eval().requires_grad_(False)
        self._empty: Condition | None = None

    @property
    def device(self) -> torch.device:
        return next(self.dit.parameters()).device

    @property
    def profile(self) -> EncoderProfile | None:
        """How the DiT was conditioned, where it was trained on more than our own layout of tokens."""
        return None if self.spec.profile is None else PROFILES[self.spec.profile]

    # Prompt and images → conditions.

    def rewrite(self, requests: Sequence[Request], **settings) -> Rewrites:
        """VERIFI; `settings` are those of `conditioning.verifi.rewrite`."""
        return rewrite(self.vlm, requests, **settings)

    def prepare(
        self, requests: Sequence[Request], *, rewriting: bool = True, keep: str | None = None, **settings
    ) -> Conditions:
        """Requests → conditions.

        Args:
            rewriting: by VERIFI, with these `settings`; if not, the prompt's own tokens stand in for the rewrite's, in
                the chat text of the model's profile if it has one.
            keep: mode of `KEEP`, the tokens that reach the DiT; None = the paper's, or without rewriting the profile's.
        """
        kinds = self.kinds(rewriting, keep)
        if rewriting:
            rewrites = self.rewrite(requests, **settings)
            return replace(
                self.conditions(rewrites.hidden_states, kinds), texts=tuple(rewrites.texts), rewrites=rewrites
            )
        for row, request in enumerate(requests):
            if not request.prompt.strip():
                raise ValueError(f"request {row}: the prompt is empty; say what the picture should show")
        return self.conditions(self.vlm.encode([self._plain(request) for request in requests]), kinds)

    def replay(self, requests: Sequence[Request], texts: Sequence[str], keep: str | None = None) -> Conditions:
        """Conditions from rewrites that are already known or were written by hand, by one forward."""
        ids = [self.vlm.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        hidden = replay(self.vlm, requests, ids)
        return replace(self.conditions(hidden, self.kinds(True, keep)), texts=tuple(texts))

    def kinds(self, rewriting: bool = True, keep: str | None = None) -> tuple[SpanKind, ...]:
        """Which tokens reach the DiT.

        Raises:
            ValueError: an unknown mode of `KEEP`.
        """
        if keep is not None and keep not in KEEP:
            raise ValueError(f"keep {keep!r}: expected one of {', '.join(KEEP)}")
        if keep is None and not rewriting:
            return self.profile.kinds if self.profile else (*PICTURE, "instruction")
        return KEEP[keep or PAPER]

    @torch.no_grad()
    def conditions(self, hidden: HiddenStates, kinds: Sequence[SpanKind] = KEEP[PAPER]) -> Conditions:
        """Hidden states → tracks. LAP runs once; each track is refined by itself, since refining mixes its tokens."""
        present = {span.kind for row in hidden.spans for span in row}
        tracks = tracks_of(kinds, "image" in present, bool(present & set(kinds) - {*PICTURE, *TEMPLATE}))
        if self.spec.refiner_place == "before":  # pooling mixes them already, and in training only what is kept
            parts = {name: self.pool(hidden.select(*kinds)) for name, kinds in tracks.items()}
        else:
            pooled = self.pool(hidden)
            parts = {name: pooled.select(*kinds) for name, kinds in tracks.items()}
        return Conditions({name: self.refine(part) for name, part in parts.items()})

    def pool(self, hidden: HiddenStates, drop_layers: Sequence[int] = ()) -> HiddenStates:
        """LAP, as `FusionHead.pool`."""
        return replace(self.fusion, drop_layers=tuple(drop_layers)).pool(hidden)

    def refine(self, pooled: HiddenStates) -> Condition:
        """The refiner, as `FusionHead.refine`."""
        return self.fusion.refine(pooled)

    def empty(self) -> Condition:
        """The true empty condition, for guidance; computed once. With a profile, its empty prompt, as in training."""
        if self._empty is None:
            if self.profile:
                hidden = self.vlm.encode([self._plain(Request(""))]).select(*self.profile.kinds)
            else:
                hidden = self.vlm.encode_empty()
            self._empty = self.refine(self.pool(hidden))
        return self._empty

    def _plain(self, request: Request) -> Request:
        """A request in the chat text that the model was trained on, unless it brings its own."""
        if self.profile is None or request.template is not None:
            return request
        template = self.profile.template_for(request.prompt, len(request.images))
        return replace(request, template=template, image_label=self.profile.image_label)

    # Conditions and noise → image.

    def velocity(self, condition: Condition) -> Velocity:
        """The DiT under one condition, whose single row serves every row of x."""

        def velocity(x: Tensor, t: Tensor, step: int) -> Tensor:
            rows = _for_rows(condition, len(x))
            dtype = self.dit.img_in.weight.dtype  # the solver itself stays in x's
            return self.dit(x.to(dtype), t, rows.tokens.to(dtype), rows.mask, rows.positions).to(x.dtype)

        return velocity

    def sample(
        self,
        conditions: Conditions | Mapping[str, Condition],
        *,
        schedule: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        size: tuple[int, int] | None = None,
        sampler: Sampler = "euler",
        count: int | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Conditions → latents [B, C, h, w].

        Args:
            schedule: which track speaks at which step (`diffusion.schedule`); None: the fullest track throughout.
            steps, guidance, size (width and height in px, divisible by `self.multiple`): None: the model's own.
            count: pictures to make; None: one per condition row. Row i starts from seed + i.
        Raises:
            ValueError: a schedule, size, number of steps or guidance that cannot be used.
        """
        tracks = conditions.tracks if isinstance(conditions, Conditions) else conditions
        default = conditions.default_track if isinstance(conditions, Conditions) else next(iter(tracks))
        plan = self.plan(
            tracks, schedule=schedule or f"{default}:0-1", steps=steps, guidance=guidance, size=size, sampler=sampler
        )
        used = {track for mix in plan.mixes for track, _ in mix}
        conditional = velocity_at(plan.mixes, {track: self.velocity(tracks[track]) for track in used})
        unconditional = self.velocity(self.empty()) if plan.guidance != 1 else None
        rows = count or max(len(tracks[track]) for track in used)
        noise = initial_noise((rows, *plan.latent_shape), seed, self.device)
        velocity = guided(conditional, unconditional, plan.guidance)
        return SAMPLERS[sampler](velocity, noise, plan.timesteps, callback)

    def plan(
        self,
        tracks: Collection[str],
        *,
        schedule: str,
        steps: int | None = None,
        guidance: float | None = None,
        size: tuple[int, int] | None = None,
        sampler: str = "euler",
    ) -> Plan:
        """What sampling will do, worked out from the names of the tracks alone; None means the model's own.

        Call it before the VLM runs, so that a mistake need not wait.

        Raises:
            ValueError: a schedule, size, number of steps, guidance or sampler that cannot be used.
        """
        steps = self.spec.steps if steps is None else steps
        guidance = self.spec.guidance if guidance is None else guidance
        if not math.isfinite(guidance):
            raise ValueError(f"guidance must be a finite number, got {guidance}")
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
        shape = self.latent_shape(size or self.spec.size)
        times = timesteps(steps, self.spec.shift_at(math.prod(shape[1:]) // self.spec.dit.patch_size**2))
        mixes = resolve(parse_schedule(schedule, tracks), steps, times)
        return Plan(times, mixes, guidance, shape)

    def decode(self, latents: Tensor) -> list[Image.Image]:
        pixels = self.vae.decode(latents).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(np.ascontiguousarray(image)) for image in pixels]

    @property
    def multiple(self) -> int:
        """What both sides of a picture must divide by."""
        return self.vae.spec.compression * self.spec.dit.patch_size

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """C, h and w of the latents of a picture of this width and height."""
        width, height = size
        if min(size) < self.multiple or max(size) > MAX_SIDE or width % self.multiple or height % self.multiple:
            raise ValueError(
                f"size {width}x{height}: both sides must be multiples of {self.multiple} from {self.multiple} to "
                f"{MAX_SIDE} px"
            )
        factor = self.vae.spec.compression
        return self.spec.dit.in_channels, height // factor, width // factor

    def generate(
        self,
        prompt: str,
        images: Sequence[Image.Image] = (),
        *,
        rewriting: bool = True,
        rewrite_settings: Mapping[str, Any] | None = None,
        max_tiles: int = 9,
        keep: str | None = None,
        **sampling,
    ) -> tuple[Image.Image, Conditions]:
        """One prompt → one picture, and what it was conditioned on; `sampling` goes to `sample`."""
        request = Request(prompt, tuple(images), max_tiles=max_tiles)
        conditions = self.prepare([request], rewriting=rewriting, keep=keep, **(rewrite_settings or {}))
        return self.decode(self.sample(conditions, **sampling))[0], conditions


def load_model(
    name: str | Path = "micro",
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    **krea2,
) -> UniFusion:
    """Loads a whole model.

    Args:
        name: an embedded model ("micro", "micro-base"); a folder that holds `vlm/`, `vae.safetensors` and one of
            `model`, `edit` or `base.safetensors`; one such safetensors file in its folder; or a folder or file of
            Krea 2, with the further arguments of `krea2.load_krea2`.
        dtype: None = float32, or the files' own for Krea 2.
    Raises:
        ValueError: no such model, or files that are missing, damaged or do not belong together.
    """
    if name not in EMBEDDED and ((Path(name) / "model_index.json").is_file() or is_krea2(name)):
        return UniFusion(*load_krea2(name, device=device, dtype=dtype, **krea2))
    if given := [key for key, value in krea2.items() if value is not None]:
        raise ValueError(f"{', '.join(given)}: only for a file of Krea 2, and {str(name)!r} is none")
    dtype = dtype or torch.float32
    weights = _weights(name)
    spec, parts = load_generator(weights, device=device, dtype=dtype)
    vlm = load_vlm(weights.parent / "vlm", layers=spec.layers, device=device, dtype=dtype)
    return UniFusion(spec, vlm, *parts, load_vae(weights.parent / "vae.safetensors", device=device, dtype=dtype))


def _weights(name: str | Path) -> Path:
    if name in EMBEDDED:
        path = WEIGHTS / "micro" / f"{EMBEDDED[name]}.safetensors"
        if not path.is_file():
            raise ValueError(f"the embedded model {name!r} is not in this installation ({path} is missing); reinstall")
        return path
    path = Path(name)
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"no model {str(name)!r}: give {', '.join(EMBEDDED)}, a model folder or a .safetensors file")
    names = ("model", "edit", "base")
    found = [path / f"{stem}.safetensors" for stem in names if (path / f"{stem}.safetensors").is_file()]
    if not found:
        raise ValueError(f"{path}: holds none of {', '.join(f'{stem}.safetensors' for stem in names)}")
    return found[0]


def load_generator(
    path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[ModelSpec, tuple[nn.Module, Refiner, DiT]]:
    """Loads LAP, refiner and DiT from one checkpoint."""
    data, tensors = load_checkpoint(path, device, dtype)
    spec = spec_from_dict(data)
    parts = build_pooling(spec.lap), Refiner(spec.refiner), DiT(spec.dit)
    holder = torch.nn.ModuleDict(dict(zip(("lap", "refiner", "dit"), parts, strict=True))).to(device, dtype)
    load_into(holder, tensors, name=str(path))
    return spec, parts


def save_generator(
    path: str | Path, spec: ModelSpec, module: torch.nn.Module, dtype: torch.dtype | None = None
) -> None:
    """Saves a module with parts named `lap`, `refiner` and `dit`."""
    tensors = {key: value.to(dtype or value.dtype) for key, value in module.state_dict().items()}
    save_checkpoint(path, tensors, spec_to_dict(spec))


def _for_rows(condition: Condition, rows: int) -> Condition:
    if len(condition) == rows:
        return condition
    if len(condition) != 1:
        raise ValueError(f"{len(condition)} conditions for {rows} pictures; give one, or one each")
    expand = [None if x is None else x.expand(rows, *x.shape[1:]) for x in (condition.mask, condition.positions)]
    return Condition(condition.tokens.expand(rows, -1, -1), *expand)
