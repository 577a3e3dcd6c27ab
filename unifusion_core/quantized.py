"""Quantised weights: ComfyUI's scaled fp8 -> plain tensors; every other quantisation is refused by name.

Scaled fp8 stores `weight = fp8 * scale` in one of two spellings: `X.scale_weight` with one `scaled_fp8` marker for the
file, or `X.weight_scale` with a `X.comfy_quant` JSON per layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

FP8 = {torch.float8_e4m3fn, torch.float8_e5m2}
SCALES = (".scale_weight", ".weight_scale")
ALONGSIDE = (".scale_input", ".input_scale", ".comfy_quant")  # of no use once the weight is plain
MARKER = "scaled_fp8"
FORMATS = {"float8_e4m3fn", "float8_e5m2"}
# a tensor's ending that only one format has
FOREIGN = {
    ".weight_scale_2": "nvfp4",
    ".weight_s_rel": "asym_w4a8_int8",
    ".weight_scale_inv": "block-wise fp8 (transformers' finegrained fp8)",
    ".weight_packed": "compressed-tensors",
    ".qweight": "GPTQ or AWQ",
    ".absmax": "bitsandbytes",
}
CURE = "load the bf16, fp16 or fp8_scaled file of the same model, or open this one by ComfyUI's own loader"


def dequantized(tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Returns the tensors with scaled fp8 undone: weight = (fp8 * scale) in float32, rounded once to `dtype`.

    ComfyUI multiplies in the compute dtype, which rounds the scale as well; the two differ by up to 0.4 % in bfloat16.

    Args:
        tensors: by name, in any prefix; a scale is one number, or one for each row of its weight.
        dtype: of the weights that were fp8; all other tensors come back as they are.
    Returns:
        A new dict without scales, markers and the settings of ComfyUI's kernels.
    Raises:
        ValueError: fp8 without its scale, a scale without its fp8 weight or not positive, or another quantisation.
    """
    _refuse_foreign(tensors)
    plain = {}
    for name, tensor in tensors.items():
        stem, _, leaf = name.rpartition(".")
        if leaf == MARKER or name.endswith(ALONGSIDE):
            continue
        if name.endswith(SCALES):
            if not _is_fp8(tensors.get(f"{stem}.weight")):
                raise ValueError(f"{name}: a scale without its fp8 weight {stem}.weight; download the file again")
            continue
        if _is_fp8(tensor):
            scale = next((tensors[stem + end] for end in SCALES if leaf == "weight" and stem + end in tensors), None)
            if scale is None:
                raise ValueError(
                    f"{name}: {_spelled(tensor)} without its scale, so its values cannot be restored; load the "
                    "fp8_scaled, bf16 or fp16 file of the same model"
                )
            tensor = (tensor.float() * _by_row(name, tensor, scale)).to(dtype)
        plain[name] = tensor
    return plain


def _by_row(name: str, weight: Tensor, scale: Tensor) -> Tensor:
    """Shapes a scale so that it multiplies its weight."""
    scale = scale.float()
    if scale.numel() not in (1, weight.shape[0]):
        raise ValueError(f"{name}: block-wise scales {list(scale.shape)} for {list(weight.shape)} (mxfp8?); {CURE}")
    if not (scale.isfinite() & (scale > 0)).all():
        raise ValueError(f"{name}: its scale is {scale.flatten()[0]:g}; expected positive numbers; download it again")
    return scale.reshape(-1, *[1] * (weight.dim() - 1)) if scale.numel() > 1 else scale.reshape(())


def _refuse_foreign(tensors: Mapping[str, Tensor]) -> None:
    # what a format alone has names it best; integers without such a sign come last
    for read in (_noted_format, _format_by_ending, _format_by_dtype):
        for name in tensors:
            if (found := read(name, tensors)) is not None:
                raise ValueError(f"{name}: quantised as {found}, which is not undone here; {CURE}")


def _noted_format(name: str, tensors: Mapping[str, Tensor]) -> str | None:
    if not name.endswith(".comfy_quant"):
        return None
    try:
        found = str(json.loads(bytes(tensors[name].flatten().tolist()))["format"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{name}: not the JSON of a quantised layer ({error}); download the file again") from None
    return None if found in FORMATS else found


def _format_by_ending(name: str, tensors: Mapping[str, Tensor]) -> str | None:
    return next((kind for end, kind in FOREIGN.items() if name.endswith(end)), None)


def _format_by_dtype(name: str, tensors: Mapping[str, Tensor]) -> str | None:
    if not name.endswith(".weight") or tensors[name].is_floating_point():
        return None
    scaled = any(name.removesuffix(".weight") + end in tensors for end in SCALES)
    return f"{'scaled' if scaled else 'packed'} {_spelled(tensors[name])}"


def _is_fp8(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dtype in FP8


def _spelled(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
