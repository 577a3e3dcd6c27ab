"""Loader nodes: the embedded micro model, files in ComfyUI's model folders, LoRA."""

from __future__ import annotations

import folder_paths
import torch
from comfy_api.latest import io

from . import sockets
from .files import EMBEDDED_MODELS, EMBEDDED_VLM, list_models, list_vlms, model_path, stamp, vlm_path
from .limits import within_limits

CATEGORY = "UniFusion/loaders"
DTYPES = {"default": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class LoadVLM(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniFusionLoadVLM",
            display_name="UniFusion Load VLM",
            category=CATEGORY,
            description="Loads the frozen vision-language model that reads prompts and pictures.",
            search_aliases=["internvl", "vision language model", "verifi", "text encoder"],
            inputs=[
                io.Combo.Input(
                    "vlm",
                    options=list_vlms(),
                    default=EMBEDDED_VLM,
                    tooltip="The embedded micro VLM, or a transformers folder in models/vlm or models/text_encoders.",
                )
            ],
            outputs=[sockets.VLM.Output(display_name="vlm", tooltip="To UniFusion Rewrite.")],
        )

    @classmethod
    def fingerprint_inputs(cls, vlm: str) -> str:
        return stamp(vlm_path(vlm))

    @classmethod
    @within_limits
    def execute(cls, vlm: str) -> io.NodeOutput:
        from .weights import load_vlm

        return io.NodeOutput(load_vlm(vlm_path(vlm)))


class LoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniFusionLoadModel",
            display_name="UniFusion Load Model",
            category=CATEGORY,
            description="Loads a UniFusion model: its DiT as MODEL, its LAP and refiner, and its VAE.",
            search_aliases=["dit", "lap", "refiner", "checkpoint", "unifusion"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=list_models(),
                    default=EMBEDDED_MODELS[0],
                    tooltip="An embedded micro model, or a UniFusion file in models/unifusion, diffusion_models or "
                    "checkpoints. Stage 1 never saw an edit: zero-shot editing is shown on it.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="default",
                    advanced=True,
                    tooltip="Weights of the DiT; default lets ComfyUI choose for your card.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The DiT; takes core's samplers, LoRA loaders and merges."),
                sockets.Fusion.Output(display_name="fusion", tooltip="LAP and refiner, to the nodes of those names."),
                io.Vae.Output(tooltip="Takes core's VAE nodes."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model: str, dtype: str) -> str:
        return stamp(model_path(model))

    @classmethod
    @within_limits
    def execute(cls, model: str, dtype: str = "default") -> io.NodeOutput:
        from .weights import load_model

        return io.NodeOutput(*load_model(model_path(model), DTYPES[dtype]))


class LoadLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniFusionLoadLoRA",
            display_name="UniFusion Load LoRA",
            category=CATEGORY,
            description="Applies a LoRA whatever its names: PEFT's and diffusers' as well as ComfyUI's and kohya's.",
            search_aliases=["lora", "peft", "adapter"],
            inputs=[
                io.Model.Input("model", tooltip="MODEL of UniFusion Load Model."),
                io.Combo.Input(
                    "lora", options=folder_paths.get_filename_list("loras"), tooltip="A file in models/loras."
                ),
                io.Float.Input(
                    "strength", default=1.0, min=-20.0, max=20.0, step=0.01, tooltip="1 applies it as it was trained."
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with the LoRA.")],
        )

    @classmethod
    @within_limits
    def execute(cls, model, lora: str, strength: float) -> io.NodeOutput:
        from .weights import apply_lora

        return io.NodeOutput(apply_lora(model, folder_paths.get_full_path_or_raise("loras", lora), strength))


NODES = [LoadVLM, LoadModel, LoadLoRA]
