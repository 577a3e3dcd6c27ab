"""Our DiT as a core MODEL and our VAE as a core VAE: every core node that takes one takes them."""

from __future__ import annotations

import json
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management as management
import comfy.patcher_extension as extension
import comfy.sd
import comfy.supported_models_base
import torch
from comfy.ldm.common_dit import pad_to_patch_size
from comfy.ldm.modules.attention import optimized_attention, optimized_attention_masked
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ..unifusion_core.conditioning_choice import describe
from ..unifusion_core.diffusion.dit import DiT, DiTSpec
from ..unifusion_core.presets import ModelSpec, spec_to_dict
from .sockets import EXTRA, KEY, NEITHER, is_pooled, unpack

if TYPE_CHECKING:
    from ..unifusion_core.vaes import AnyVAE

SPEC_TENSOR = "unifusion_spec"  # of a file that core's ModelSave wrote: the spec as JSON bytes
GRID = 2**16  # positions are passed as integers, which core does not round to the model's dtype


class ComfyDiT(DiT):
    """The DiT behind the signature that ComfyUI calls, with its linear layers and its attention."""

    def __init__(self, spec: DiTSpec, dtype=None, device=None, operations=nn, **_):
        linear = SimpleNamespace(Linear=partial(operations.Linear, dtype=dtype, device=device))
        super().__init__(spec, operations=linear, attention=self._attention)
        self.dtype = dtype
        self._options: dict = {}

    def forward(self, x, timesteps, context=None, transformer_options={}, **conds) -> Tensor:  # noqa: B006 (core's own signature)
        return extension.WrapperExecutor.new_class_executor(
            self._forward,
            self,
            extension.get_all_wrappers(extension.WrappersMP.DIFFUSION_MODEL, transformer_options),
        ).execute(x, timesteps, context, transformer_options, **conds)

    def _forward(self, x, timesteps, context, transformer_options, condition_mask=None, condition_places=None, **_):
        self._options = transformer_options
        height, width = x.shape[2:]
        mask = None if condition_mask is None else condition_mask.bool()
        positions = None if condition_places is None else condition_places.float() / GRID
        latents = pad_to_patch_size(x, (self.spec.patch_size, self.spec.patch_size))
        return super().forward(latents, timesteps, context, mask, positions)[..., :height, :width]

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        attend = optimized_attention
        if mask is not None:  # core's kernels agree on a bias [B, 1, T, T] only
            attend = optimized_attention_masked
            bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, torch.finfo(q.dtype).min)
            mask = bias.expand(-1, -1, q.shape[2], -1)
        return attend(
            q,
            k,
            v,
            q.shape[1],
            mask=mask,
            skip_reshape=True,
            skip_output_reshape=True,
            transformer_options=self._options,
        )


class UniFusionModel(comfy.model_base.BaseModel):
    def __init__(self, config: UniFusionConfig, device=None) -> None:
        super().__init__(config, comfy.model_base.ModelType.FLOW, device=device, unet_model=ComfyDiT)
        self.memory_usage_factor_conds = ("c_crossattn",)
        cells = config.spec.dit.patch_size**2  # a condition token costs as much as one patch of latents
        self.memory_usage_shape_process = {"c_crossattn": lambda shape: [shape[0], 1, shape[1] * cells]}

    def process_timestep(self, timestep: Tensor, **_) -> Tensor:
        """Flow time in 0..1, whichever multiplier a ModelSampling node set."""
        return timestep / getattr(self.model_sampling, "multiplier", 1.0)

    def extra_conds(self, **kwargs) -> dict:
        spec = self.model_config.spec
        tensor, noise = kwargs.get("cross_attn"), kwargs.get("noise")
        if noise is not None and noise.shape[1] != spec.dit.in_channels:
            raise ValueError(
                f"latents of {noise.shape[1]} channels: this UniFusion model takes {spec.dit.in_channels}; connect "
                "UniFusion Empty Latent, or VAE Encode with the VAE of UniFusion Load Model"
            )
        wanted, width = spec.dit.slots * spec.dit.condition_width + EXTRA, None if tensor is None else tensor.shape[-1]
        if width != wanted:
            why = f"it is for another model; this one takes {describe(spec)}: connect its own fusion"
            why = why if KEY in kwargs else NEITHER
            raise ValueError(f"conditioning of width {width} into the UniFusion model {spec.name!r}: {why}")
        if spec.refiner_place == "after" and is_pooled(tensor):
            raise ValueError("the conditioning is pooled but not refined: connect UniFusion Refine in between")
        out = super().extra_conds(**{key: value for key, value in kwargs.items() if key != "cross_attn"})
        condition = unpack(tensor)
        out["c_crossattn"] = comfy.conds.CONDRegular(condition.tokens)
        if condition.mask is not None:
            out["condition_mask"] = comfy.conds.CONDRegular(condition.mask.int())
        if condition.positions is not None:
            out["condition_places"] = comfy.conds.CONDRegular((condition.positions * GRID).round().int())
        return out

    def extra_conds_shapes(self, **kwargs) -> dict:
        tensor = kwargs.get("cross_attn")
        return {} if tensor is None else {"c_crossattn": list(tensor.shape)}

    def state_dict_for_saving(self, unet_state_dict, *args, **kwargs):
        """Adds the spec, without which the file could not be loaded again."""
        saved = super().state_dict_for_saving(unet_state_dict, *args, **kwargs)
        text = json.dumps(spec_to_dict(self.model_config.spec)).encode()
        return {**saved, SPEC_TENSOR: torch.tensor(list(text), dtype=torch.uint8)}


class UniFusionConfig(comfy.supported_models_base.BASE):
    unet_config = {"image_model": "unifusion"}
    unet_extra_config: dict = {}
    supported_inference_dtypes = [torch.bfloat16, torch.float16, torch.float32]
    memory_usage_factor = 2.2  # Krea 2's, whose architecture this is

    def __init__(self, spec: ModelSpec, compression: int) -> None:
        self.spec = spec
        self.latent_format = lambda: UniFusionLatents(spec, compression)
        super().__init__({**self.unet_config, "spec": spec.dit})
        self.sampling_settings = {"shift": spec.shift, "multiplier": 1.0}

    def get_model(self, state_dict, prefix="", device=None) -> UniFusionModel:
        return UniFusionModel(self, device=device)

    def clip_target(self, state_dict=None) -> None:
        return None


class UniFusionLatents(comfy.latent_formats.LatentFormat):
    """The VAE of UniFusion normalises its latents itself, so they pass as they are."""

    def __init__(self, spec: ModelSpec, compression: int) -> None:
        self.latent_channels = spec.dit.in_channels
        self.spacial_downscale_ratio = compression
        if spec.preview is not None:
            *self.latent_rgb_factors, self.latent_rgb_factors_bias = [list(row) for row in spec.preview]


def load_dit(
    spec: ModelSpec, tensors: dict[str, Tensor], *, compression: int, dtype: torch.dtype | None = None, dynamic=True
) -> ModelPatcher:
    """The DiT's tensors, named as in the DiT, as a core MODEL."""
    config = UniFusionConfig(spec, compression)
    load_device, offload_device = management.get_torch_device(), management.unet_offload_device()
    stored = next(iter(tensors.values())).dtype
    parameters = sum(tensor.numel() for tensor in tensors.values())
    dtype = dtype or management.unet_dtype(
        model_params=parameters, supported_dtypes=config.supported_inference_dtypes, weight_dtype=stored
    )
    manual_cast = management.unet_manual_cast(dtype, load_device, config.supported_inference_dtypes)
    config.set_inference_dtype(dtype, manual_cast, device=load_device)
    model = config.get_model(tensors)
    _check(model.diffusion_model, tensors)
    kind = comfy.model_patcher.CoreModelPatcher if dynamic else ModelPatcher
    patcher = kind(model, load_device=load_device, offload_device=offload_device)
    if not management.is_device_cpu(offload_device):
        model.to(offload_device)
    model.load_model_weights(dict(tensors), "", assign=patcher.is_dynamic())
    return patcher


def _check(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """core only logs what does not fit, and a missing tensor would stay random."""
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in tensors.items()}
    if odd := sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name)):
        name = odd[0]
        raise ValueError(
            f"the DiT's weights do not fit its spec: {len(odd)} tensors differ, first {name} (file {given.get(name)}, "
            f"spec {wanted.get(name)}); take the file and its spec from one training"
        )


class ComfyVAE(comfy.sd.VAE):
    """Our VAE under core's interface."""

    def __init__(self, vae: AnyVAE) -> None:
        super().__init__(sd={"pixel_space_vae": torch.tensor(1.0)})  # fills core's defaults; replaced below
        spec = vae.spec
        self.first_stage_model = _Images(vae)
        self.latent_channels, self.latent_dim, self.output_channels = spec.latent_channels, 2, 3
        self.downscale_ratio = self.upscale_ratio = spec.compression
        self.process_input = lambda image: image
        self.process_output = lambda image: image.clamp_(0.0, 1.0)
        self.working_dtypes = [torch.float32]
        self.vae_dtype = next(vae.parameters()).dtype
        self.disable_offload = True  # diffusers' layers cannot be streamed
        self.size = None
        self.memory_used_encode = lambda shape, dtype: self._bytes(shape[2] * shape[3], dtype)
        self.memory_used_decode = lambda shape, dtype: self._bytes(shape[2] * shape[3] * spec.compression**2, dtype)
        self.patcher = ModelPatcher(
            self.first_stage_model, load_device=self.device, offload_device=management.vae_offload_device()
        )
        self.model_size()

    def vae_encode_crop_pixels(self, pixels: Tensor) -> Tensor:
        """Crops about the centre, as core does, to whole patches of the VAE: [B, H, W, C]."""
        height, width = pixels.shape[1:3]
        multiple = self.first_stage_model.vae.spec.multiple
        if min(height, width) < multiple:
            raise ValueError(f"a picture of {width} x {height} px: this VAE takes sides of {multiple} px or more")
        pixels = pixels.narrow(1, height % multiple // 2, height - height % multiple)
        pixels = pixels.narrow(2, width % multiple // 2, width - width % multiple)
        return super().vae_encode_crop_pixels(pixels)

    def _bytes(self, pixels: int, dtype: torch.dtype) -> int:
        return max(1, pixels * self.first_stage_model.vae.spec.decoder_values * management.dtype_size(dtype))


class _Images(nn.Module):
    """The two calls that core makes."""

    def __init__(self, vae: AnyVAE) -> None:
        super().__init__()
        self.vae = vae

    def encode(self, images: Tensor) -> Tensor:
        return self.vae.encode(images)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents that are no whole patches are filled up by their last row and column, and the picture is cut."""
        spec, (height, width) = self.vae.spec, latents.shape[-2:]
        patch = (spec.multiple // spec.compression,) * 2
        images = self.vae.decode(pad_to_patch_size(latents, patch, padding_mode="replicate"))
        return images[..., : height * spec.compression, : width * spec.compression]
