"""Files → what travels on the sockets. Imported when a loader first runs: transformers and diffusers come with it."""

from __future__ import annotations

import json
from pathlib import Path

import comfy.model_management as management
import comfy.sd
import torch
from comfy_execution.graph_utils import ExecutionBlocker

from ..unifusion_core.checkpoint import load_into, load_tensors, read_spec
from ..unifusion_core.conditioning.adapter import load_adapter as load_adapter_file
from ..unifusion_core.conditioning.pooling import build_pooling
from ..unifusion_core.conditioning.refiner import Refiner
from ..unifusion_core.conditioning.vlm import load_vlm as load_vlm_files
from ..unifusion_core.fusion import FusionHead
from ..unifusion_core.lora import to_comfy
from ..unifusion_core.presets import ModelSpec, spec_from_dict
from ..unifusion_core.vaes import load_vae
from . import stepping
from .files import WEIGHTS, tokenizer_of
from .memory import LOADED, ManagedAdapter, ManagedFusion, ManagedVLM, managed
from .model import SPEC_TENSOR, ComfyVAE, load_dit

COMPRESSION = 8  # of a VAE that is not at hand; the field's usual one
SAVED = "model.diffusion_model."  # core's prefix in checkpoints
ONLY_DIT = (
    "this file holds the DiT alone (core's Save Model wrote it): take LAP and refiner from a UniFusion Load Model of "
    "the model it was made from"
)
NO_VAE = "there is no vae.safetensors beside this model: connect a VAE of {channels} channels by core's Load VAE"


def load_vlm(
    path: Path, dtype: torch.dtype | None = None, quantization: str | None = None, offload: bool = False
) -> ManagedVLM:
    """A VLM that ComfyUI moves; or, quantised or offloaded, one that stays where its library has put it."""
    key = "vlm", path, path.stat().st_mtime_ns, dtype, quantization, offload
    shared = LOADED.get(key)
    if shared is None:
        where = {} if not (quantization or offload) else {"device": management.text_encoder_device()}
        vlm = load_vlm_files(
            path,
            dtype=dtype or _text_dtype(),
            tokenizer=tokenizer_of(path),
            quantization=quantization,
            offload="auto" if offload else None,
            **where,
        )
        shared = LOADED[key] = ManagedVLM(vlm, managed() if where else managed(vlm=vlm.model))
    return shared


def load_model(path: Path, dtype: torch.dtype | None) -> tuple:
    """MODEL, UNIFUSION_FUSION and VAE of a file; what is not there blocks the nodes that need it, with the reason."""
    spec, parts = read_parts(path)
    found = _vae_beside(path, spec)
    vae = wrap_vae(found) if found else ExecutionBlocker(NO_VAE.format(channels=spec.dit.in_channels))
    patcher = load_patcher(path, dtype, vae.downscale_ratio if found else COMPRESSION)
    fusion = _fusion(spec, parts) if parts["refiner"] else ExecutionBlocker(ONLY_DIT)  # not every rival has weights
    return patcher, fusion, vae


def read_parts(path: Path) -> tuple[ModelSpec, dict[str, dict[str, torch.Tensor]]]:
    """The spec of a model file, and its tensors by part: dit, lap, refiner."""
    tensors = load_tensors(path)
    if SPEC_TENSOR in tensors:
        spec = spec_from_dict(json.loads(bytes(tensors[SPEC_TENSOR].tolist())))
        return spec, {"dit": _below(tensors, SAVED), "lap": {}, "refiner": {}}
    return spec_from_dict(read_spec(path)), {part: _below(tensors, f"{part}.") for part in ("dit", "lap", "refiner")}


def load_patcher(path: Path, dtype: torch.dtype | None, compression: int, disable_dynamic: bool = False):
    """The MODEL of a file; core calls this again where it needs another copy."""
    spec, parts = read_parts(path)
    patcher = load_dit(spec, parts["dit"], compression=compression, dtype=dtype, dynamic=not disable_dynamic)
    patcher.cached_patcher_init = (load_patcher, (path, dtype, compression))
    stepping.attach(patcher)
    return patcher


def wrap_vae(path: Path) -> ComfyVAE:
    vae = ComfyVAE(load_vae(path))
    vae.patcher.cached_patcher_init = (_vae_patcher, (path,))
    return vae


def load_adapter(path: Path) -> ManagedAdapter:
    key = "adapter", path, path.stat().st_mtime_ns
    shared = LOADED.get(key)
    if shared is None:
        adapter = load_adapter_file(path).to(_text_dtype())
        shared = LOADED[key] = ManagedAdapter(adapter, managed(adapter=adapter))
    return shared


def apply_lora(model, path: str, strength: float):
    tensors = to_comfy(load_tensors(path))
    before = sum(map(len, model.patches.values()))
    patched, _ = comfy.sd.load_lora_for_models(model, None, tensors, strength, 0)
    if patched is model or (strength and sum(map(len, patched.patches.values())) == before):
        raise ValueError(f"{Path(path).name}: none of its {len(tensors)} tensors fits this model; take a LoRA of it")
    return patched


def managed_fusion(head: FusionHead) -> ManagedFusion:
    dtype = _text_dtype()
    for module in (head.lap, head.refiner):
        module.to(dtype).eval().requires_grad_(False)
    return ManagedFusion(head, managed(lap=head.lap, refiner=head.refiner))


def _vae_beside(path: Path, spec: ModelSpec) -> Path | None:
    """The VAE in the model's folder; for a micro model, such as a merged one, the embedded one."""
    folders = (path.parent, WEIGHTS) if spec.name.startswith("micro") else (path.parent,)
    files = (folder / "vae.safetensors" for folder in folders)
    return next((file for file in files if file.is_file()), None)


def _vae_patcher(path: Path, disable_dynamic: bool = False):
    return wrap_vae(path).patcher


def _fusion(spec: ModelSpec, parts: dict) -> ManagedFusion:
    lap, refiner = build_pooling(spec.lap), Refiner(spec.refiner)
    load_into(lap, parts["lap"], name="LAP")
    load_into(refiner, parts["refiner"], name="refiner")
    return managed_fusion(FusionHead(spec, lap, refiner))


def _text_dtype() -> torch.dtype:
    """fp32 on a CPU; on a card bf16 where it can, as the large VLMs are stored."""
    device = management.text_encoder_device()
    return torch.bfloat16 if management.should_use_bf16(device) and device.type != "cpu" else torch.float32


def _below(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
