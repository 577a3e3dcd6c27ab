"""Core's Krea 2 under our nodes: a MODEL whose text fusion is UniFusion's LAP and refiner.

Core runs that fusion within every forward, over the states of 12 layers of Qwen3-VL-4B. Here LAP and refiner run once,
as nodes, and the model is taught to accept tokens that are fused already; it still takes core's own conditioning.
LoRA, quantised weights, offloading and reference latents stay core's business.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import comfy.lora
import comfy.model_base
import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import get_key_weight
from comfy.patcher_extension import WrappersMP
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor, nn

from . import stepping
from .files import krea2_vae, tensor_names
from .memory import ManagedFusion
from .sockets import EXTRA, is_pooled

KEY = "unifusion_krea2"
DIT, FUSION = "diffusion_model.", "txtfusion."
TELL_SIZES = (  # to core, before it builds the model
    "first.weight",
    "blocks.0.attn.wq.weight",
    "blocks.0.attn.wk.weight",
    "txtfusion.layerwise_blocks.0.prenorm.scale",
)
NO_VAE = "models/vae holds neither qwen_image_vae nor wan_2.1_vae (.safetensors): put one there, or use core's Load VAE"


def is_krea2(patcher) -> bool:
    return isinstance(patcher.model, comfy.model_base.Krea2)


def load(path: Path, dtype: torch.dtype | None) -> tuple:
    """MODEL, UNIFUSION_FUSION and VAE of a ComfyUI single file of Krea 2.

    Raises:
        ValueError: the file lacks tensors, which core would leave at random.
    """
    _check_holds(path, TELL_SIZES)
    patcher = comfy.sd.load_diffusion_model(str(path), model_options={} if dtype is None else {"dtype": dtype})
    _check_holds(path, (name for name, _ in patcher.model.diffusion_model.named_parameters()))
    accept_fused(patcher)
    return patcher, fusion_of(patcher), _vae()


def accept_fused(patcher) -> None:
    """Puts the wrappers for fused conditioning, and those for schedules, on a Krea 2 MODEL, once."""
    stepping.attach(patcher)
    for place, wrapper in ((WrappersMP.OUTER_SAMPLE, _around_sampling), (WrappersMP.CALC_COND_BATCH, _around_batch)):
        patcher.remove_wrappers_with_key(place, KEY)
        patcher.add_wrapper_with_key(place, KEY, wrapper)


def fusion_of(patcher) -> ManagedFusion:
    """LAP and refiner with the weights of a Krea 2 MODEL, its LoRA applied and its quantisation undone.

    Raises:
        ValueError: the MODEL is of another class.
    """
    from ..unifusion_core.krea2 import fusion_from
    from .weights import managed_fusion

    if not is_krea2(patcher):
        raise ValueError(
            f"model is {type(patcher.model).__name__}: only Krea 2 carries a fusion head; connect core's Load "
            "Diffusion Model with a Krea 2 file. UniFusion's own models give theirs at UniFusion Load Model"
        )
    names = [name for name, _ in patcher.model.diffusion_model.txtfusion.named_parameters()]
    return managed_fusion(fusion_from({f"{FUSION}{name}": _patched(patcher, f"{DIT}{FUSION}{name}") for name in names}))


def _patched(patcher, key: str) -> Tensor:
    """A weight of a MODEL in float32, as its patches make it; rounded to nothing, unlike the one core computes with."""
    weight, _, dequantised = get_key_weight(patcher.model, key)
    if key in patcher.backup:  # the model is loaded, and its weights are patched in place
        weight = patcher.backup[key].weight
    if key in patcher.hook_backup:
        weight = patcher.hook_backup[key][0]
    if dequantised is not None:
        weight = dequantised(weight, inplace=False)
    weight = weight.detach().to("cpu", torch.float32, copy=True)  # patches are added in place
    return comfy.lora.calculate_weight(patcher.patches.get(key, []), weight, key)


def _check_holds(path: Path, wanted: Iterable[str]) -> None:
    held = {name.removeprefix(f"model.{DIT}") for name in tensor_names(path)}
    if missing := [name for name in wanted if name not in held]:
        raise ValueError(f"{path.name} lacks {len(missing)} tensors of Krea 2, first {missing[0]}; copy the file again")


def _vae():
    path = krea2_vae()
    if path is None:
        return ExecutionBlocker(NO_VAE)
    tensors, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    vae = comfy.sd.VAE(sd=tensors, metadata=metadata)
    vae.throw_exception_if_invalid()
    vae.patcher.cached_patcher_init = (comfy.sd.load_vae_patcher, (str(path), metadata, None))
    return vae


class _FusedDiT:
    """Added to the class of core's DiT. Beside its stack of layers, context may be tokens [B, T, E + EXTRA]."""

    def _unpack_context(self, context: Tensor) -> Tensor:
        fused = context.shape[-1] == self.txtdim + EXTRA
        return context[..., :-EXTRA] if fused else super()._unpack_context(context)


class _FusedText:
    """Added to the class of core's text fusion: what is fused already, [B, T, E], passes as it is."""

    def forward(self, x: Tensor, mask: Tensor | None = None, transformer_options: dict | None = None) -> Tensor:
        return x if x.ndim == 3 else super().forward(x, mask, transformer_options or {})


def _add(behaviour: type, module: nn.Module) -> None:
    """Gives one module a further base class, once.

    The class and not an attribute, for then compiled models, copies on other cards and state dicts are as before.
    """
    kind = type(module)
    if not issubclass(kind, behaviour):
        module.__class__ = type(kind.__name__, (behaviour, kind), {})


def _around_batch(execute, model, conds, x_in, timestep, model_options):
    for one in (model, *(clone.model for clone in model_options.get("multigpu_clones", {}).values())):
        _add(_FusedDiT, one.diffusion_model)
        _add(_FusedText, one.diffusion_model.txtfusion)
    return execute(model, conds, x_in, timestep, model_options)


def _around_sampling(execute, *args, **kwargs):
    guider = execute.class_obj
    dit = guider.model_patcher.model.diffusion_model
    guider.conds = {name: _accepted(entries, dit) for name, entries in guider.conds.items()}
    return execute(*args, **kwargs)


def _accepted(entries: Iterable[dict], dit: nn.Module) -> list[dict]:
    """Conditionings as the model reads them.

    Raises:
        ValueError: one is neither fused nor core's own, or has padding that cannot be left out.
    """
    return [
        entry if entry.get("cross_attn") is None else {**entry, "cross_attn": _tokens(entry["cross_attn"], dit)}
        for entry in entries
    ]


def _tokens(tensor: Tensor, dit: nn.Module) -> Tensor:
    width, fused, stack = tensor.shape[-1], dit.txtdim + EXTRA, dit.txtlayers * dit.txtdim
    if width == stack:
        return tensor
    if width != fused:
        raise ValueError(
            f"conditioning of width {width} into Krea 2, which takes {fused}, from UniFusion Refine with this model's "
            f"fusion, or {stack}, from core's CLIP Text Encode with a CLIP of type krea2 or UniFusion Encode for Model"
        )
    if is_pooled(tensor):
        raise ValueError("the conditioning is pooled but not refined: connect UniFusion Refine in between")
    return _without_padding(tensor)


def _without_padding(tensor: Tensor) -> Tensor:
    """Krea 2 reads no mask, so what is padding must go; as its text has no positions, nothing else changes."""
    real = tensor[..., -1] != 0
    lengths = real.sum(1).tolist()
    if len(set(lengths)) > 1:
        raise ValueError(
            f"conditioning with rows of {lengths} tokens: Krea 2 reads no mask, so padding cannot be left out; encode "
            "one prompt at a time"
        )
    return tensor[real].unflatten(0, (len(lengths), lengths[0]))
