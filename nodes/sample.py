"""Noise → latents → picture, by core's own machinery."""

from __future__ import annotations

import math

import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io

from ..unifusion_core.diffusion.flow import timesteps
from .limits import within_limits

CATEGORY = "UniFusion/sampling"
MAX_SIDE, SEED_MAX = 4096, 2**64 - 1
FLOW = "flow"


class EmptyLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        tooltip = "px; the micro model drew 64, Krea 2 about 1024."

        def side(name: str) -> io.Int.Input:
            return io.Int.Input(name, default=64, min=16, max=MAX_SIDE, step=16, tooltip=tooltip)

        return io.Schema(
            node_id="UniFusionEmptyLatent",
            display_name="UniFusion Empty Latent",
            category=CATEGORY,
            description="Latents of the model's own channels and compression, at zero.",
            search_aliases=["empty latent", "size", "resolution"],
            inputs=[
                io.Model.Input("model", tooltip="From UniFusion Load Model; says how many channels."),
                side("width"),
                side("height"),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Pictures at a time."),
            ],
            outputs=[io.Latent.Output(tooltip="To a sampler.")],
        )

    @classmethod
    @within_limits
    def execute(cls, model, width, height, batch_size=1) -> io.NodeOutput:
        form = model.get_model_object("latent_format")
        ratio = form.spacial_downscale_ratio
        patch = getattr(getattr(model.model.diffusion_model, "spec", None), "patch_size", 1)
        if width % (ratio * patch) or height % (ratio * patch):
            raise ValueError(f"{width} x {height}: both sides must be multiples of {ratio * patch} px for this model")
        samples = torch.zeros(batch_size, form.latent_channels, height // ratio, width // ratio)
        return io.NodeOutput({"samples": samples, "downscale_ratio_spacial": ratio})


class Sampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniFusionSampler",
            display_name="UniFusion Sampler (DiT)",
            category=CATEGORY,
            description="Samples the DiT through core's samplers, with flow matching's own steps. KSampler and "
            "SamplerCustomAdvanced take the same sockets.",
            search_aliases=["ksampler", "dit sampler", "flow matching", "euler", "heun"],
            inputs=[
                io.Model.Input("model", tooltip="From UniFusion Load Model, with LoRA and patches as you like."),
                io.Conditioning.Input("positive", tooltip="From UniFusion Refine or UniFusion Schedule."),
                io.Latent.Input("latent_image", tooltip="Empty, or of a picture with denoise below 1."),
                io.Int.Input(
                    "seed", default=0, min=0, max=SEED_MAX, control_after_generate=True, tooltip="Of the noise."
                ),
                io.Int.Input("steps", default=20, min=1, max=1000, tooltip="Steps from noise to picture."),
                io.Float.Input(
                    "guidance",
                    default=2.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="How far to lead away from the negative; 1 turns it off and halves the time.",
                ),
                io.Combo.Input(
                    "sampler", options=comfy.samplers.SAMPLER_NAMES, default="euler", tooltip="Core's samplers."
                ),
                io.Combo.Input(
                    "scheduler",
                    options=[FLOW, *comfy.samplers.SCHEDULER_NAMES],
                    default=FLOW,
                    tooltip="Flow: even steps under the model's shift. Simple is the same where steps divide 1000.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Below 1 starts from the latent image.",
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="From UniFusion Empty Conditioning; needed unless guidance is 1."
                ),
            ],
            outputs=[io.Latent.Output(tooltip="To UniFusion VAE Decode or VAE Decode.")],
        )

    @classmethod
    @within_limits
    def execute(
        cls, model, positive, latent_image, seed, steps, guidance, sampler, scheduler, denoise=1.0, negative=None
    ) -> io.NodeOutput:
        if negative is None and guidance != 1:
            raise ValueError(
                f"guidance {guidance} needs a negative: connect UniFusion Empty Conditioning, or set it to 1"
            )
        latents = comfy.sample.fix_empty_latent_channels(
            model, latent_image["samples"], latent_image.get("downscale_ratio_spacial")
        )
        samples = comfy.sample.sample_custom(
            model,
            comfy.sample.prepare_noise(latents, seed, latent_image.get("batch_index")),
            guidance,
            comfy.samplers.sampler_object(sampler),
            sigmas_of(model, scheduler, steps, denoise, sampler),
            positive,
            positive if negative is None else negative,
            latents,
            noise_mask=latent_image.get("noise_mask"),
            callback=latent_preview.prepare_callback(model, steps),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
        return io.NodeOutput({**latent_image, "samples": samples})


class VAEDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniFusionVAEDecode",
            display_name="UniFusion VAE Decode",
            category=CATEGORY,
            description="Latents to pictures; the same as core's VAE Decode.",
            search_aliases=["vae decode", "latent to image"],
            inputs=[
                io.Vae.Input("vae", tooltip="From UniFusion Load Model, or core's Load VAE."),
                io.Latent.Input("samples", tooltip="From a sampler."),
            ],
            outputs=[io.Image.Output(tooltip="One picture per latent.")],
        )

    @classmethod
    @within_limits
    def execute(cls, vae, samples) -> io.NodeOutput:
        latents = samples["samples"]
        if latents.shape[1] != vae.latent_channels:
            raise ValueError(
                f"latents of {latents.shape[1]} channels: this VAE takes {vae.latent_channels}; take the model's own"
            )
        images = vae.decode(latents)
        return io.NodeOutput(images.flatten(0, 1) if images.ndim == 5 else images)  # a video VAE's pictures are frames


def sigmas_of(model, scheduler: str, steps: int, denoise: float, sampler: str) -> torch.Tensor:
    """The edges of the steps, as core's KSampler takes them: with denoise below 1, the last of a longer way."""
    if scheduler != FLOW:
        return comfy.samplers.KSampler(model, steps, model.load_device, sampler, scheduler, denoise).sigmas
    sampling = model.get_model_object("model_sampling")
    shift = getattr(sampling, "shift", None)
    if shift is None:
        raise ValueError("the scheduler flow needs a flow-matching model; choose one of core's schedulers")
    if isinstance(sampling, comfy.model_sampling.ModelSamplingFlux):
        shift = math.exp(shift)  # Flux and Krea 2 keep its logarithm
    return timesteps(max(steps, int(steps / denoise)), float(shift))[-(steps + 1) :]


NODES = [EmptyLatent, Sampler, VAEDecode]
