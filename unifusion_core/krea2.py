"""Krea 2's public weights in our LAP, refiner and DiT: diffusers' folder, or ComfyUI's single files.

Krea 2 is a model of UniFusion's shape: 12 taps of Qwen3-VL-4B, attention over layers, a refiner, a single-stream DiT.
Its open weights were trained on text alone: image tokens reach it, but only as a variation of what they show.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .checkpoint import load_into, load_tensors, tensor_names
from .conditioning.lap import LAPSpec, LayerwiseAttentionPooling
from .conditioning.refiner import Refiner, RefinerSpec
from .conditioning.vlm import FrozenVLM, load_vlm
from .diffusion.dit import DiT, DiTSpec
from .diffusion.vae import QwenImageVAE, from_wan, qwen_image_spec
from .fusion import FusionHead
from .presets import KREA2_MU, ModelSpec, krea2, krea2_turbo
from .quantized import dequantized

PIPELINE = "Krea2Pipeline"
WEIGHTS = "diffusion_pytorch_model.safetensors"  # diffusers' name in each folder of a model

# The fusion's projector tells the two namings apart; what stands before it is the prefix of the whole model.
MARKERS = {"diffusers": "text_fusion.projector.weight", "comfyui": "txtfusion.projector.weight"}
RENAMES = {
    "diffusers": (
        (r"^text_fusion\.layerwise_blocks\.", "lap.blocks."),
        (r"^text_fusion\.projector\.", "lap.projector."),
        (r"^text_fusion\.refiner_blocks\.", "refiner.blocks."),
        (r"^transformer_blocks\.", "dit.blocks."),
        (r"^(img_in|time_embed|time_mod_proj|txt_in|final_layer)\.", r"dit.\1."),
        (r"\.attn\.to_out\.0\.", ".attn.to_out."),
    ),
    "comfyui": (
        (r"^txtfusion\.layerwise_blocks\.", "lap.blocks."),
        (r"^txtfusion\.projector\.", "lap.projector."),
        (r"^txtfusion\.refiner_blocks\.", "refiner.blocks."),
        (r"^blocks\.", "dit.blocks."),
        (r"^first\.", "dit.img_in."),
        (r"^tmlp\.0\.", "dit.time_embed.linear_1."),
        (r"^tmlp\.2\.", "dit.time_embed.linear_2."),
        (r"^tproj\.1\.", "dit.time_mod_proj."),
        (r"^txtmlp\.0\.scale$", "dit.txt_in.norm.weight"),
        (r"^txtmlp\.1\.", "dit.txt_in.linear_1."),
        (r"^txtmlp\.3\.", "dit.txt_in.linear_2."),
        (r"^last\.linear\.", "dit.final_layer.linear."),
        (r"^last\.norm\.scale$", "dit.final_layer.norm.weight"),
        (r"^last\.modulation\.lin$", "dit.final_layer.scale_shift_table"),
        (r"\.mod\.lin$", ".scale_shift_table"),
        (r"\.prenorm\.scale$", ".norm1.weight"),
        (r"\.postnorm\.scale$", ".norm2.weight"),
        (r"\.attn\.w([qkv])\.", r".attn.to_\1."),
        (r"\.attn\.gate\.", ".attn.to_gate."),
        (r"\.attn\.wo\.", ".attn.to_out."),
        (r"\.attn\.qknorm\.([qk])norm\.scale$", r".attn.norm_\1.weight"),
        (r"\.mlp\.", ".ff."),
    ),
}


class Krea2(NamedTuple):
    """The parts of a Krea 2 model, in the order that `pipeline.UniFusion` takes them."""

    spec: ModelSpec
    vlm: FrozenVLM
    lap: LayerwiseAttentionPooling
    refiner: Refiner
    dit: DiT
    vae: QwenImageVAE


def load_krea2(
    path: str | Path,
    *,
    text_encoder: str | Path | None = None,
    vae: str | Path | None = None,
    tokenizer: str | Path | None = None,
    distilled: bool | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Krea2:
    """Loads a whole Krea 2 model; nothing is downloaded.

    Args:
        path: a folder as diffusers' `Krea2Pipeline` saves it, or ComfyUI's single file of the diffusion model (bf16 or
            scaled fp8; from `models/diffusion_models`).
        text_encoder, vae, tokenizer: for a single file, ComfyUI's `qwen3vl_4b…` file or a transformers folder, its
            `qwen_image_vae` file or diffusers' folder, and a folder with the tokenizer; for a folder, replace its own.
        distilled: whether it is the few-step model ("turbo"), which needs no guidance; None = what the folder says, or
            whether the single file's name says turbo, for nothing in it does.
        dtype: of the computation; None keeps the files' own, bfloat16 where they are fp8.
    Raises:
        ValueError: a part is missing, damaged, of another model, or does not fit the others.
    """
    path = Path(path)
    folder = path if path.is_dir() else None
    if folder is None:
        index, config, scheduler, weights = {}, {}, None, path
        if distilled is None:
            distilled = "turbo" in path.name.lower()
        if missing := [name for name, file in (("text encoder", text_encoder), ("VAE", vae)) if file is None]:
            raise ValueError(
                f"{path}: a single file of Krea 2 holds no {' and no '.join(missing)}; name them too (--text-encoder "
                "FILE, --vae FILE, --tokenizer DIR), or load the folder in diffusers' layout"
            )
    else:
        index = _index(folder)
        config = _read_json(folder / "transformer" / "config.json")
        scheduler = _read_json(folder / "scheduler" / "scheduler_config.json")
        weights = folder / "transformer" / WEIGHTS
        distilled = bool(index.get("is_distilled")) if distilled is None else distilled
        text_encoder, vae = text_encoder or folder / "text_encoder", vae or folder / "vae"
        tokenizer = tokenizer or folder / "tokenizer"

    tensors = read(weights, device, dtype)
    spec = spec_of(
        tensors,
        config,
        layers=index.get("text_encoder_select_layers"),
        patch_size=index.get("patch_size") or 2,
        distilled=distilled,
    )
    if scheduler is not None:
        spec = _with_shift(spec, scheduler, distilled, folder)
    parts = _build(spec, tensors, str(weights))
    autoencoder = load_vae(vae, device=device, dtype=dtype)
    if autoencoder.spec.latent_channels != spec.dit.in_channels:
        raise ValueError(
            f"{vae}: a VAE of {autoencoder.spec.latent_channels} latent channels, but the DiT draws "
            f"{spec.dit.in_channels}; load the VAE that belongs to the model"
        )
    vlm = _load_vlm(text_encoder, layers=spec.layers, device=device, dtype=dtype, tokenizer=tokenizer)
    if vlm.width != spec.lap.width:
        raise ValueError(
            f"{text_encoder}: a VLM of width {vlm.width}, but the fusion head takes {spec.lap.width}; Krea 2 was "
            "trained on Qwen3-VL-4B"
        )
    return Krea2(spec, vlm, *parts, autoencoder)


def is_krea2(path: str | Path) -> bool:
    """Whether a folder or file looks like Krea 2, by `model_index.json` or by the names of its tensors."""
    path = Path(path)
    if path.is_dir():
        file = path / "model_index.json"
        return file.is_file() and _read_json(file).get("_class_name") == PIPELINE
    return path.is_file() and _naming(tensor_names(path)) is not None


def fusion_from(tensors: Mapping[str, Tensor], layers: Sequence[int] | None = None) -> FusionHead:
    """LAP and refiner alone, from the tensors of `txtfusion` or `text_fusion` in any prefix; others are ignored.

    Scaled fp8 is undone. They are on the tensors' device, in their dtype, and share their memory.

    Args:
        layers: the tapped layers; None = Krea 2's own twelve.
    Raises:
        ValueError: tensors are missing, unknown or misshapen.
    """
    ours = renamed(_plain({name: tensor for name, tensor in tensors.items() if is_fusion(name)}))
    lap, refiner = _fusion_specs(ours, eps=1e-5)
    base = krea2()
    spec = replace(
        base,
        layers=_layers(layers, lap.num_layers),
        lap=lap,
        refiner=refiner,
        dit=replace(base.dit, condition_width=lap.width),
    )
    with torch.device("meta"):
        parts = nn.ModuleDict({"lap": LayerwiseAttentionPooling(lap), "refiner": Refiner(refiner)})
    load_into(parts, ours, name="Krea 2's text fusion (as lap and refiner)")
    parts.eval().requires_grad_(False)
    return FusionHead(spec, parts["lap"], parts["refiner"])


def load_fusion(
    path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> FusionHead:
    """`fusion_from` a file or folder of Krea 2, of which only those 343 M parameters are read."""
    path = Path(path)
    if path.is_dir():
        _index(path)
        path = path / "transformer" / WEIGHTS
    return fusion_from(_plain(load_tensors(path, device, only=is_fusion), dtype))


def is_fusion(name: str) -> bool:
    """Whether a tensor of this name belongs to LAP or refiner."""
    return re.search(r"(^|\.)(txtfusion|text_fusion)\.", name) is not None


def read(path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Reads the tensors of LAP, refiner and DiT under our names, memory-mapped where nothing has to be converted."""
    naming = _naming(tensor_names(path))
    if naming is None:
        raise ValueError(
            f"{path}: no Krea 2 (neither {' nor '.join(MARKERS.values())} is in it); take the diffusion model's file, "
            "such as krea2_turbo_bf16.safetensors, or the folder in diffusers' layout"
        )
    prefix, _ = naming
    return renamed(_plain(load_tensors(path, device, only=lambda name: name.startswith(prefix)), dtype))


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of either naming under the names of `lap`, `refiner` and `dit`; those outside the model are left out.

    Raises:
        ValueError: not Krea 2.
    """
    naming = _naming(tensors)
    if naming is None:
        raise ValueError(f"these tensors are not Krea 2's: none is called {' or '.join(MARKERS.values())}")
    prefix, style = naming
    ours = {}
    for name, tensor in tensors.items():
        if not name.startswith(prefix):
            continue
        name = name.removeprefix(prefix)
        for pattern, replacement in RENAMES[style]:
            name = re.sub(pattern, replacement, name)
        if name.startswith("dit.blocks.") and name.endswith(".scale_shift_table") and tensor.ndim == 1:
            tensor = tensor.unflatten(0, (6, -1))  # ComfyUI's is flat
        ours[name] = tensor
    return ours


def spec_of(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    *,
    layers: Sequence[int] | None = None,
    patch_size: int = 2,
    distilled: bool = False,
) -> ModelSpec:
    """The spec of `renamed` tensors, from their shapes.

    Args:
        config: diffusers' `transformer/config.json`, for what no shape tells; without one, the public model's: theta
            1000, eps 1e-5, and three quarters of a head for rows and columns.
    Raises:
        ValueError: a tensor that is needed is missing, or the shapes contradict each other.
    """
    config = config or {}
    eps = float(config.get("norm_eps", 1e-5))
    lap, refiner = _fusion_specs(tensors, eps)
    width, patch_channels = _shape(tensors, "dit.img_in.weight", 2)
    heads = _attention(tensors, "dit.blocks.0.attn")
    if patch_channels % patch_size**2:
        raise ValueError(f"the DiT reads {patch_channels} channels, which is no multiple of {patch_size}² pixels")
    base = krea2_turbo() if distilled else krea2()
    return replace(
        base,
        layers=_layers(layers, lap.num_layers),
        lap=lap,
        refiner=refiner,
        dit=DiTSpec(
            in_channels=patch_channels // patch_size**2,
            patch_size=patch_size,
            depth=_depth(tensors, "dit"),
            num_heads=width // heads["head_dim"],
            num_kv_heads=heads["num_kv_heads"],
            head_dim=heads["head_dim"],
            intermediate_size=_shape(tensors, "dit.blocks.0.ff.gate.weight", 2)[0],
            timestep_dim=_shape(tensors, "dit.time_embed.linear_1.weight", 2)[1],
            condition_width=_shape(tensors, "dit.txt_in.norm.weight", 1)[0],
            axes_dim=config.get("axes_dims_rope") or _axes(heads["head_dim"]),
            theta=float(config.get("rope_theta", 1000.0)),
            eps=eps,
        ),
    )


def load_vae(path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> QwenImageVAE:
    """Loads Qwen-Image's VAE from diffusers' folder or from ComfyUI's `qwen_image_vae` file.

    Raises:
        ValueError: another VAE, or files that are missing or damaged.
    """
    path = Path(path)
    try:
        if path.is_dir():
            spec = qwen_image_spec(_read_json(path / "config.json"))
            tensors = load_tensors(path / WEIGHTS, device, dtype)
        else:
            spec, tensors = from_wan(load_tensors(path, device, dtype))
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    with torch.device("meta"):
        vae = QwenImageVAE(spec)
    load_into(vae.autoencoder, tensors, name=str(path))
    return vae.to(device).eval().requires_grad_(False)


def _load_vlm(path: str | Path, **options) -> FrozenVLM:
    try:
        return load_vlm(path, **options)
    except ValueError as error:
        if "lm_head" not in str(error):
            raise
        raise ValueError(
            f"{path}: this text encoder has no output head (lm_head.weight), and its embeddings do not stand in for "
            "one, so it could not rewrite a prompt; give the whole Qwen3-VL-4B by text_encoder (--text-encoder)"
        ) from error


def _build(spec: ModelSpec, tensors: Mapping[str, Tensor], name: str) -> tuple:
    with torch.device("meta"):
        parts = LayerwiseAttentionPooling(spec.lap), Refiner(spec.refiner), DiT(spec.dit)
    holder = nn.ModuleDict(dict(zip(("lap", "refiner", "dit"), parts, strict=True)))
    load_into(holder, tensors, name=f"{name} (Krea 2, under our names lap, refiner and dit)")
    return parts


def _naming(names: Iterable[str]) -> tuple[str, str] | None:
    """Prefix and style of the names; None if they are not Krea 2's."""
    for name in names:
        for style, marker in MARKERS.items():
            if name == marker or name.endswith(f".{marker}"):
                return name.removesuffix(marker), style
    return None


def _plain(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Undoes scaled fp8 and brings what is multiplied to one dtype, by default the most frequent; norms keep theirs."""
    tensors = dequantized(tensors, dtype or torch.bfloat16)
    if dtype is None:
        sizes: dict[torch.dtype, int] = {}
        for tensor in tensors.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
        dtype = max(sizes, key=sizes.get)
    return {
        name: tensor.to(dtype) if name.endswith(("weight", "bias")) and "norm" not in name else tensor
        for name, tensor in tensors.items()
    }


def _fusion_specs(tensors: Mapping[str, Tensor], eps: float) -> tuple[LAPSpec, RefinerSpec]:
    sizes = []
    for part in ("lap", "refiner"):
        width, heads = (
            _shape(tensors, f"{part}.blocks.0.norm1.weight", 1)[0],
            _attention(tensors, f"{part}.blocks.0.attn"),
        )
        if width % heads["head_dim"]:
            raise ValueError(f"the {part} is {width} wide, which is no multiple of its heads' {heads['head_dim']}")
        sizes.append(
            {
                "width": width,
                "num_heads": width // heads["head_dim"],
                "num_kv_heads": heads["num_kv_heads"],
                "intermediate_size": _shape(tensors, f"{part}.blocks.0.ff.gate.weight", 2)[0],
                "depth": _depth(tensors, part),
                "eps": eps,
            }
        )
    lap, refiner = sizes
    return LAPSpec(num_layers=_shape(tensors, "lap.projector.weight", 2)[1], **lap), RefinerSpec(**refiner)


def _attention(tensors: Mapping[str, Tensor], place: str) -> dict[str, int]:
    head_dim = _shape(tensors, f"{place}.norm_q.weight", 1)[0]
    return {"head_dim": head_dim, "num_kv_heads": _shape(tensors, f"{place}.to_k.weight", 2)[0] // head_dim}


def _depth(tensors: Mapping[str, Tensor], part: str) -> int:
    numbers = {int(name.split(".")[2]) for name in tensors if re.match(rf"{part}\.blocks\.[0-9]+\.", name)}
    return max(numbers, default=-1) + 1


def _shape(tensors: Mapping[str, Tensor], name: str, ndim: int) -> tuple[int, ...]:
    if name not in tensors:
        raise ValueError(f"Krea 2's tensor {name} (our name) is missing; download the file again")
    shape = tuple(tensors[name].shape)
    if len(shape) != ndim:
        raise ValueError(f"Krea 2's tensor {name} (our name) is {list(shape)}; expected {ndim} axes: another model?")
    return shape


def _axes(head_dim: int) -> tuple[int, int, int]:
    """Krea 2's division of a head: 6/16 for rows, 6/16 for columns, the rest for the axis that pictures do not use."""
    side = 6 * (head_dim // 16)
    return head_dim - 2 * side, side, side


def _layers(layers: Sequence[int] | None, num_layers: int) -> tuple[int, ...]:
    layers = tuple(krea2().layers if layers is None else layers)
    if len(layers) != num_layers:
        raise ValueError(f"the fusion head pools {num_layers} layers, but {len(layers)} are named: {layers}")
    return layers


def _with_shift(spec: ModelSpec, scheduler: Mapping[str, Any], distilled: bool, folder: Path) -> ModelSpec:
    """The folder's schedule; defaults of absent options are diffusers' own.

    Raises:
        ValueError: a scheduler that our sampler does not follow.
    """
    name = scheduler.get("_class_name")
    refused = ("shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
    refused += ("invert_sigmas", "stochastic_sampling")
    odd = [option for option in refused if scheduler.get(option)]
    dynamic = scheduler.get("use_dynamic_shifting", False)
    if dynamic and scheduler.get("time_shift_type", "exponential") != "exponential":
        odd.append("time_shift_type")
    if name != "FlowMatchEulerDiscreteScheduler" or odd:
        what = f"{name} with {', '.join(f'{option}={scheduler[option]!r}' for option in odd)}" if odd else name
        raise ValueError(
            f"{folder / 'scheduler'}: the schedule {what} is not Krea 2's; expected FlowMatchEulerDiscreteScheduler "
            "with a shift alone: take the scheduler folder of the original model"
        )
    if not dynamic:
        return replace(spec, shift=float(scheduler.get("shift", 1.0)), shift_by_size=None)
    if distilled:
        return replace(spec, shift=math.exp(KREA2_MU), shift_by_size=None)
    mu = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    tokens = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    return replace(spec, shift_by_size=(*mu, *tokens))


def _index(folder: Path) -> dict[str, Any]:
    index = _read_json(folder / "model_index.json")
    if index.get("_class_name") != PIPELINE:
        raise ValueError(f"{folder}: a folder of {index.get('_class_name')!r}; expected one of diffusers' {PIPELINE}")
    return index


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a Krea 2 folder as diffusers saves it")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(data).__name__}")
    return data
