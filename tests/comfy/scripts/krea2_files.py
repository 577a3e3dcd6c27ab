"""Files of a tiny Krea 2 with core's own names, layouts and dtypes, for the script beside."""

import json
import math
import os

SIZES = {
    "features": 256,  # two heads of 128, the only head size that core's detection knows
    "heads": 2,
    "kvheads": 1,
    "layers": 2,
    "txtdim": 40,  # twenty heads, as core's
    "txtlayers": 12,
}
SMALL_VAE = {
    "dim": 8,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "image_channels": 3,
    "conv_out_channels": 3,
    "dropout": 0.0,
}
PREFIX = "model.diffusion_model."
WRITTEN: list[str] = []


def folder(name: str) -> str:
    import folder_paths

    return next(filter(os.path.isdir, folder_paths.get_folder_paths(name)))


def save(tensors: dict, kind: str, name: str, metadata: dict | None = None) -> str:
    from safetensors.torch import save_file

    WRITTEN.append(os.path.join(folder(kind), name))
    save_file({key: value.contiguous() for key, value in tensors.items()}, WRITTEN[-1], metadata)
    return name


def remove_written() -> None:
    """Other scripts see the same folders."""
    for path in WRITTEN:
        os.remove(path)


def krea2_tensors(seed: int = 0) -> dict:
    import comfy.ldm.krea2.model
    import comfy.ops
    import torch

    torch.manual_seed(seed)
    dit = comfy.ldm.krea2.model.SingleStreamDiT(**SIZES, operations=comfy.ops.disable_weight_init, dtype=torch.float32)
    return {name: _random(name, value) for name, value in dit.state_dict().items()}


def wan_tensors() -> dict:
    import comfy.ldm.wan.vae

    vae = comfy.ldm.wan.vae.WanVAE(**SMALL_VAE)
    return {name: _random(name, value) for name, value in vae.state_dict().items()}


def _random(name: str, value):
    import torch

    if name.endswith("gamma"):
        return torch.ones_like(value)
    fan = math.prod(value.shape[1:]) if value.ndim > 1 and not name.endswith(".lin") else 25
    return torch.randn(value.shape) * fan**-0.5


def is_linear(name: str, value) -> bool:
    return value.ndim == 2 and name.endswith(".weight") and name != "txtfusion.projector.weight"


def scaled_fp8(tensors: dict, *, old: bool) -> tuple[dict, dict]:
    """ComfyUI's two layouts of fp8 with a scale: `.scale_weight` with a mark, and `.weight_scale` with metadata."""
    import torch

    out, layers = {}, {}
    for name, value in tensors.items():
        if not is_linear(name, value):
            out[name] = value
            continue
        layer, scale = name.removesuffix(".weight"), value.abs().max() / 448
        out[name] = (value / scale).to(torch.float8_e4m3fn)
        out[f"{layer}.scale_weight" if old else f"{layer}.weight_scale"] = scale
        layers[layer] = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    if old:
        return out | {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, {}
    return out, {"_quantization_metadata": json.dumps({"layers": layers})}


def lora_tensors() -> dict:
    """Of the DiT in ComfyUI's names, of the text fusion in diffusers'."""
    import torch

    torch.manual_seed(9)
    out = {}
    for name, (rows, columns) in {
        "diffusion_model.blocks.0.attn.wq": (256, 256),
        "diffusion_model.blocks.1.mlp.down": (256, 768),
        "transformer.text_fusion.layerwise_blocks.0.attn.to_q": (40, 40),
        "transformer.text_fusion.refiner_blocks.1.ff.up": (128, 40),
        "transformer.text_fusion.projector": (1, 12),
    }.items():
        out[f"{name}.lora_A.weight"] = torch.randn(4, columns) * columns**-0.5
        out[f"{name}.lora_B.weight"] = torch.randn(rows, 4) * 0.5
    return out
