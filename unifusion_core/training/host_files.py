"""Folders of public models in diffusers' layout → the frozen transformer and VAE that an adapter is trained before.

Transformers are loaded by the classes of their own projects, from this machine alone; no code of a folder is run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, Flux2Transformer2DModel, ZImageTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoint import read_table
from ..conditioning.profiles import PROFILES
from ..diffusion import flow
from ..diffusion.vae import check_images
from ..diffusion.vae_flux2 import PATCH, Flux2VAE
from ..vaes import load_vae

WEIGHTS = "diffusion_pytorch_model.safetensors"
DIFFUSERS = {each.__name__: each for each in (Flux2Transformer2DModel, ZImageTransformer2DModel)}
FAILURES = (OSError, RuntimeError, ValueError, TypeError, KeyError)  # of diffusers, on a damaged folder
INSTALL = "git clone https://github.com/boogu-project/Boogu-Image && pip install --no-deps -e Boogu-Image && "
INSTALL += "pip install einops"


# The transformer.


@dataclass(frozen=True)
class HostFolder:
    """A model's folders. whole: the one with `model_index.json`, None where the transformer stands alone."""

    path: Path
    transformer: Path
    whole: Path | None

    @property
    def index(self) -> dict[str, Any]:
        return {} if self.whole is None else _read_json(self.whole / "model_index.json")

    def part(self, *names: str) -> Path | None:
        """The first of these folders of a whole model that is there."""
        found = [self.whole / name for name in names if self.whole and (self.whole / name).is_dir()]
        return found[0] if found else None


def host_folder(path: Path) -> HostFolder:
    """Finds the transformer, and the whole model around it.

    Raises:
        ValueError: neither a whole model in diffusers' layout nor the folder of a transformer.
    """
    path = Path(path)
    if (path / "model_index.json").is_file():
        return HostFolder(path, path / "transformer", path)
    if (path / "config.json").is_file():
        around = path.absolute().parent
        return HostFolder(path, path, around if (around / "model_index.json").is_file() else None)
    raise ValueError(
        f"--host {path}: neither model_index.json nor a transformer's config.json is in it; give a model's folder in "
        "diffusers' layout, or its folder transformer"
    )


def check_base(profile: str, folder: HostFolder) -> str | None:
    """What its files leave open on whether a model was distilled, as one line, or None.

    Raises:
        ValueError: they say that it was.
    """
    title = PROFILES[profile].title
    if folder.index.get("is_distilled"):
        raise ValueError(
            f"--host {folder.path}: a distilled model, by its model_index.json, whose few steps are not the flow that "
            f"is trained here; take the base model of {title}"
        )
    if KINDS[profile].name != ZImageTransformer2DModel.__name__:
        return None
    return f"warning: the files of {title} do not tell the base from the distilled Turbo; see that --host is the base"


def load_transformer(profile: str, folder: HostFolder, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Loads the DiT of a profile, frozen.

    Raises:
        ValueError: another model's, damaged files, or Boogu-Image's package is not installed.
    """
    path, kind = folder.transformer, KINDS[profile]
    config = _read_json(path / "config.json")
    if (name := config.get("_class_name")) != kind.name:
        raise ValueError(f"{path}: a {name}, but {PROFILES[profile].title} is a {kind.name}; give that model's folder")
    if odd := kind.odd(config, profile):
        raise ValueError(f"{path}: {odd}, so it is not {PROFILES[profile].title}; give that model, or its own profile")
    read_table(path / WEIGHTS)  # whole, and safetensors
    loaded = _class_of(kind.name)
    options = {"torch_dtype": dtype, "local_files_only": True, "use_safetensors": True}
    try:
        transformer, report = loaded.from_pretrained(path, output_loading_info=True, **options)
    except FAILURES as error:
        raise ValueError(f"{path}: {error}; copy the files of this model again, all from one place") from error
    for what in ("missing", "unexpected", "mismatched"):
        if keys := report[f"{what}_keys"]:
            raise ValueError(f"{path}: {len(keys)} {what} keys in the weights, first {sorted(map(str, keys))[0]}")
    return transformer.to(device).eval().requires_grad_(False)


def patch_of(transformer: nn.Module) -> int:
    """The side of its patches, in latents."""
    config = transformer.config
    return config.patch_size if "patch_size" in config else config.all_patch_size[0]


def channels_of(transformer: nn.Module) -> int:
    return transformer.config.in_channels


def _class_of(name: str) -> type[nn.Module]:
    if name in DIFFUSERS:
        return DIFFUSERS[name]
    try:
        from boogu.models.transformers import BooguImageTransformer2DModel
    except ImportError as error:
        raise ValueError(
            f"Boogu-Image's transformer comes with its own package, which cannot be imported ({error}); install it: "
            f"{INSTALL}"
        ) from None
    return BooguImageTransformer2DModel


def _odd_z_image(config: dict[str, Any], profile: str) -> str | None:
    return _odd_width(config.get("cap_feat_dim"), PROFILES[profile].width)


def _odd_klein(config: dict[str, Any], profile: str) -> str | None:
    if config.get("guidance_embeds", True):
        return "it takes a guidance scale, as FLUX.2 dev does"
    return _odd_width(config.get("joint_attention_dim"), PROFILES[profile].width * len(PROFILES[profile].layers))


def _odd_boogu(config: dict[str, Any], profile: str) -> str | None:
    features = config.get("instruction_feature_configs") or {}
    if (layers := features.get("num_instruction_feature_layers", 1)) != 1:
        return f"it reads {layers} layers of its VLM"
    return _odd_width(features.get("instruction_feat_dim"), PROFILES[profile].width)


def _odd_width(found: int | None, expected: int) -> str | None:
    return None if found == expected else f"it reads tokens of width {found}, not {expected}"


# The VAE, as the host draws.


@dataclass(frozen=True)
class HostVAESpec:
    """latent_channels, compression: as the host sees them; the rest makes raw latents its own."""

    latent_channels: int
    compression: int
    shift: float = 0.0
    scale: float = 1.0


class FluxVAE(nn.Module):
    """FLUX.1's AutoencoderKL, which Z-Image and Boogu-Image draw by: latents are (raw - shift) * scale."""

    def __init__(self, autoencoder: AutoencoderKL) -> None:
        super().__init__()
        config = autoencoder.config
        self.autoencoder = autoencoder
        self.spec = HostVAESpec(
            latent_channels=config.latent_channels,
            compression=2 ** (len(config.block_out_channels) - 1),
            shift=config.shift_factor or 0.0,
            scale=config.scaling_factor or 1.0,
        )

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in 0..1 → latents [B, C, H/f, W/f], the posterior's mode."""
        pixels = check_images(images, self.spec.compression) * 2 - 1
        raw = self.autoencoder.encode(pixels.to(self.autoencoder.dtype)).latent_dist.mode()
        return (raw - self.spec.shift) * self.spec.scale


class PatchedVAE(nn.Module):
    """FLUX.2's VAE with its latents in the patches that Klein draws: [B, 128, H/16, W/16]."""

    def __init__(self, vae: Flux2VAE) -> None:
        super().__init__()
        self.vae = vae
        self.spec = HostVAESpec(vae.spec.latent_channels * PATCH**2, vae.spec.compression * PATCH)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        return F.pixel_unshuffle(self.vae.encode(images), PATCH)


def load_host_vae(profile: str, path: Path, device: torch.device) -> FluxVAE | PatchedVAE:
    """The VAE of a profile's DiT in float32, from diffusers' folder; FLUX.2's also from ComfyUI's single file.

    Raises:
        ValueError: another VAE, or damaged files.
    """
    path = Path(path)
    title = PROFILES[profile].title
    if KINDS[profile] is KLEIN:
        vae = load_vae(path, device=device)
        if not isinstance(vae, Flux2VAE):
            raise ValueError(f"--vae {path}: a {type(vae).__name__}, but {title} draws by FLUX.2's VAE; give that")
        return PatchedVAE(vae)
    name = _read_json(path / "config.json").get("_class_name")
    if name != AutoencoderKL.__name__:
        raise ValueError(f"--vae {path}: a {name}, but {title} draws by FLUX.1's {AutoencoderKL.__name__}; give that")
    read_table(path / WEIGHTS)
    try:
        vae = AutoencoderKL.from_pretrained(path, local_files_only=True, use_safetensors=True)
    except FAILURES as error:
        raise ValueError(f"{path}: {error}; copy the files of this VAE again, all from one place") from error
    return FluxVAE(vae.float()).to(device).eval().requires_grad_(False)


# The times it was drawn at.


def shift_of(profile: str, folder: HostFolder) -> Callable[[tuple[int, int]], float]:
    """Latent size (h, w) → the shift at which the host draws, and so is trained before, by its scheduler's settings.

    Doubt: nobody published the times that these models were trained at.
    """
    at = folder.part("scheduler")
    config = {} if at is None else _read_json(at / "scheduler_config.json")
    return KINDS[profile].shift(config)


def _z_image_shift(config: dict[str, Any]) -> Callable[[tuple[int, int]], float]:
    """A number, or diffusers' line through two sizes."""
    if not config.get("use_dynamic_shifting", False):
        return lambda size: config.get("shift", 3.0)
    mu = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    tokens = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    return lambda size: flow.size_shift(size[0] * size[1] // 4, mu, tokens)


def _klein_shift(config: dict[str, Any]) -> Callable[[tuple[int, int]], float]:
    """What its pipeline comes to with many steps (200); with few it moves all of them towards noise."""
    return lambda size: math.exp(0.00016927 * size[0] * size[1] + 0.45666666)


def _boogu_shift(config: dict[str, Any]) -> Callable[[tuple[int, int]], float]:
    """Its scheduler's: by default 1.6 at 512 px and 3.2 at 1024 px."""
    dynamic, half = config.get("dynamic_time_shift", True), config.get("time_shift_v2_half_scaling_factor", 20.0)

    def shift(size: tuple[int, int]) -> float:
        tokens = size[0] * size[1] if dynamic else config.get("seq_len")
        if not tokens or not config.get("do_shift", True):
            return 1.0
        if config.get("time_shift_version", "v2") == "v2":
            return math.sqrt(tokens) / (2 * half)
        mu = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return flow.size_shift(tokens // 4 if dynamic else tokens, mu, (256, 4096))

    return shift


@dataclass(frozen=True)
class HostKind:
    """name: of the transformer's class; odd(config, profile): what tells it from the profile's; shift: `shift_of`."""

    name: str
    odd: Callable[[dict[str, Any], str], str | None]
    shift: Callable[[dict[str, Any]], Callable[[tuple[int, int]], float]]


KLEIN = HostKind(Flux2Transformer2DModel.__name__, _odd_klein, _klein_shift)
BOOGU = HostKind("BooguImageTransformer2DModel", _odd_boogu, _boogu_shift)
KINDS = {
    "z-image": HostKind(ZImageTransformer2DModel.__name__, _odd_z_image, _z_image_shift),
    "klein-4b": KLEIN,
    "klein-9b": KLEIN,
    "boogu": BOOGU,
    "boogu-edit": BOOGU,
}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a whole folder in diffusers' layout")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); copy or download it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds no JSON object; copy or download it again")
    return found
