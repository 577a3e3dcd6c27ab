"""A node pack for tests: core's loaders give small random models of core's own classes under the names of real files.

So a workflow that needs downloads runs whole, every node of it core's or ours and none of it stubbed but the sizes.
Krea 2 and its VAE are small files that core reads as it reads the real ones; the other classes fix sizes that no file
can change, and are built here. The two scripts beside know how.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import comfy.model_patcher
import comfy.sd
import comfy.supported_models_base
import folder_paths
import torch

import nodes

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))

import krea2_files  # noqa: E402
import profiles  # noqa: E402

NODE_CLASS_MAPPINGS: dict = {}
KREA2_WIDTH = krea2_files.SIZES["txtdim"]
LAYERS = 36
KREA2, KREA2_VAE = "krea2_turbo_fp8_scaled.safetensors", "qwen_image_vae.safetensors"
DITS = {
    "boogu_image_edit_fp8_scaled.safetensors": ("Boogu", profiles.BOOGU),
    "qwen_image_edit_2511_fp8mixed.safetensors": ("QwenImage", profiles.QWEN_IMAGE),
    "ideogram4_fp8_scaled.safetensors": ("Ideogram4", profiles.IDEOGRAM),
    "ideogram4_unconditional_fp8_scaled.safetensors": ("Ideogram4", profiles.IDEOGRAM),
    "flux-2-klein-4b.safetensors": ("Flux2", profiles.KLEIN),
    "z_image_turbo_bf16.safetensors": ("ZImage", profiles.Z_IMAGE),
}
VAES = {"ae.safetensors": (16, 8), "flux2-vae.safetensors": (128, 16)}  # channels, px of one latent
CLIPS = (
    "qwen3vl_4b_fp8_scaled.safetensors",
    "qwen3vl_8b_fp8_scaled.safetensors",
    "qwen_2.5_vl_7b_fp8_scaled.safetensors",
    "qwen_3_4b.safetensors",
)
VLM = "Qwen3-VL-4B-Instruct"  # a folder, as transformers reads it


def ideogram() -> tuple:
    import comfy.text_encoders.ideogram4 as family

    profiles.eyes()
    return family.Ideogram4Qwen3VLTokenizer, family.te_qwen3vl()


# What core's Load CLIP is asked for → tokenizer and text encoder.
ENCODERS = {
    "krea2": profiles.krea2,
    "boogu": profiles.boogu,
    "qwen_image": profiles.qwen_image,
    "ideogram4": ideogram,
    "flux2": partial(profiles.klein, "qwen3_4b"),
    "lumina2": profiles.z_image,
}
CLASSES: dict[str, tuple] = {}  # by type; making one twice would shrink core's classes twice
VLM_PATH = Path(folder_paths.models_dir) / "vlm" / VLM


def small_clip(kind: str) -> comfy.sd.CLIP:
    if kind not in CLASSES:
        CLASSES[kind] = ENCODERS[kind]()
    width = KREA2_WIDTH if kind == "krea2" else profiles.W
    sizes = {**profiles.TEXT, "hidden_size": width}
    names = ("qwen3vl_4b", "qwen3vl_8b", "qwen25_7b", "qwen3_4b", "qwen3_8b")
    options = {"dtype": torch.float32, **{f"{name}_model_config": sizes for name in names}}
    torch.manual_seed(0)
    clip = comfy.sd.CLIP(comfy.supported_models_base.ClipTarget(*CLASSES[kind]), model_options=options)
    profiles.fill(clip.cond_stage_model)
    return clip


class SmallVAE(torch.nn.Module):
    """Averages in, repeats out, through a random mix of channels."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        self.ratio, self.mix = ratio, torch.nn.Parameter(torch.randn(channels, 3), requires_grad=False)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        small = torch.nn.functional.avg_pool2d(x, self.ratio)
        return torch.einsum("bchw,kc->bkhw", small, self.mix.to(x))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        pixels = torch.einsum("bkhw,kc->bchw", z, self.mix.to(z)) / len(self.mix) ** 0.5
        return torch.nn.functional.interpolate(pixels.tanh(), scale_factor=float(self.ratio))


def small_vae(channels: int, ratio: int) -> comfy.sd.VAE:
    torch.manual_seed(0)
    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)}, dtype=torch.float32)
    vae.latent_channels, vae.latent_dim = channels, 2
    vae.downscale_ratio = vae.upscale_ratio = ratio
    vae.first_stage_model = SmallVAE(channels, ratio)
    vae.patcher = comfy.model_patcher.ModelPatcher(
        vae.first_stage_model, load_device=vae.device, offload_device=torch.device("cpu")
    )
    return vae


def narrow_profiles() -> None:
    """The pack's table of encoders, at the width of these."""
    for name, module in list(sys.modules.items()):
        if name.endswith("unifusion_core.conditioning.profiles"):
            for key, profile in module.PROFILES.items():
                module.PROFILES[key] = replace(profile, width=KREA2_WIDTH if key == "krea2" else profiles.W)


def write_files() -> None:
    """Small ones where core can read them, empty ones to be listed where it cannot."""
    torch.manual_seed(0)
    tensors, metadata = krea2_files.scaled_fp8(krea2_files.krea2_tensors(), old=False)
    krea2_files.save(tensors, "diffusion_models", KREA2, metadata)
    krea2_files.save(krea2_files.wan_tensors(), "vae", KREA2_VAE)
    for kind, names in (("diffusion_models", DITS), ("vae", VAES), ("text_encoders", CLIPS)):
        for name in names:
            krea2_files.save({}, kind, name)


def write_vlm() -> None:
    from transformers import Qwen2TokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

    source = os.path.join(os.path.dirname(comfy.sd.__file__), "text_encoders", "qwen25_tokenizer")
    tokenizer = Qwen2TokenizerFast.from_pretrained(source)
    vision = {"depth": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "num_position_embeddings": 64}
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [8, 4, 4], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": 151936,
            "hidden_size": KREA2_WIDTH,
            "intermediate_size": 64,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "max_position_embeddings": 8192,
            "rope_parameters": rope,
        },
        vision_config=vision | {"out_hidden_size": KREA2_WIDTH, "deepstack_visual_indexes": [0, 1, 2]},
        tie_word_embeddings=True,
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
    )
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config)
    profiles.fill(model)
    model.save_pretrained(VLM_PATH)
    tokenizer.save_pretrained(VLM_PATH)


def _load_clip(self, clip_name, type="stable_diffusion", device="default"):
    narrow_profiles()
    return (small_clip(type),)


def _load_unet(self, unet_name, weight_dtype, _core=nodes.UNETLoader.load_unet):
    narrow_profiles()
    if unet_name not in DITS:
        return _core(self, unet_name, weight_dtype)
    torch.manual_seed(1)
    return (profiles.small_dit(*DITS[unet_name]),)


def _load_vae(self, vae_name, *args, _core=nodes.VAELoader.load_vae, **words):
    return (small_vae(*VAES[vae_name]),) if vae_name in VAES else _core(self, vae_name, *args, **words)


nodes.CLIPLoader.load_clip, nodes.UNETLoader.load_unet, nodes.VAELoader.load_vae = _load_clip, _load_unet, _load_vae
with torch.inference_mode(False):
    write_files()
    write_vlm()
