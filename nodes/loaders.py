"""Loader nodes: the embedded micro model, files in ComfyUI's model folders, LoRA."""

from __future__ import annotations

import folder_paths
import torch
from comfy_api.latest import io, ui
from comfy_execution.utils import get_executing_context
from server import PromptServer

from . import sockets
from .files import (
    EMBEDDED_MODELS,
    EMBEDDED_VLM,
    adapter_path,
    is_krea2,
    krea2_vae,
    list_adapters,
    list_models,
    list_vlms,
    model_path,
    stamp,
    vlm_path,
)
from .limits import within_limits

CATEGORY = "UniFusion/loaders"
DTYPES = {"default": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

NONE = "none"
TRAINED_ON_TEXT = (
    "The open weights of Krea 2 were trained on text: tokens of pictures vary what is shown, they edit no picture."
)


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
                    tooltip="The embedded micro VLM; a transformers folder in models/vlm or models/text_encoders; or a "
                    "single file of Qwen-VL there.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="default",
                    optional=True,
                    advanced=True,
                    tooltip="Of the weights; default is fp32 on a CPU and bf16 on a card that can.",
                ),
                io.Combo.Input(
                    "quantization",
                    options=[NONE, "bnb-4bit", "bnb-8bit", "torchao-int8", "fp8"],
                    default=NONE,
                    optional=True,
                    advanced=True,
                    tooltip="Squeezes the weights while loading, where that package is installed; the words change.",
                ),
                io.Boolean.Input(
                    "offload",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="For a card that is too small: accelerate spreads the layers over card, memory and disk.",
                ),
            ],
            outputs=[sockets.VLM.Output(display_name="vlm", tooltip="To UniFusion Rewrite.")],
        )

    @classmethod
    def fingerprint_inputs(cls, vlm: str, dtype="default", quantization="none", offload=False) -> str:
        return stamp(vlm_path(vlm))

    @classmethod
    @within_limits
    def execute(cls, vlm: str, dtype="default", quantization="none", offload=False) -> io.NodeOutput:
        from .weights import load_vlm

        squeezed = None if quantization == NONE else quantization
        return io.NodeOutput(load_vlm(vlm_path(vlm), DTYPES[dtype], squeezed, offload))


class VLMFromCLIP(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniFusionVLMFromCLIP",
            display_name="UniFusion VLM from CLIP",
            category=CATEGORY,
            description="Makes a VLM of a language model that is loaded as CLIP already, without a second copy: "
            "Qwen3-VL, Qwen2.5-VL, Gemma-3, or (text only) Qwen3. LoRA and quantisation of the CLIP stay. The node "
            "says what is particular about this one.",
            search_aliases=["qwen3-vl", "qwen2.5-vl", "gemma", "text encoder", "verifi", "krea 2"],
            inputs=[
                io.Clip.Input("clip", tooltip="From core's Load CLIP, for instance qwen3vl_4b of type krea2."),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="default",
                    advanced=True,
                    tooltip="Of the whole pass. Default: what ComfyUI generates text with on this device (bf16 where "
                    "it can). fp32: what ComfyUI encodes prompts with; closest to core's conditioning, slower.",
                ),
            ],
            outputs=[sockets.VLM.Output(display_name="vlm", tooltip="To UniFusion Rewrite.")],
        )

    @classmethod
    @within_limits
    def execute(cls, clip, dtype: str = "default") -> io.NodeOutput:
        from .clip_vlm import vlm_from_clip

        vlm = vlm_from_clip(clip, DTYPES[dtype])
        notes, context, server = "\n".join(vlm.vlm.notes), get_executing_context(), PromptServer.instance
        if context is not None and server is not None:
            server.send_progress_text(notes, context.node_id)  # the frontend shows it on any node
        return io.NodeOutput(vlm, ui=ui.PreviewText(notes))


class LoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniFusionLoadModel",
            display_name="UniFusion Load Model",
            category=CATEGORY,
            description="Loads a UniFusion model, or Krea 2: its DiT as MODEL, its LAP and refiner, and its VAE. "
            f"{TRAINED_ON_TEXT}",
            search_aliases=["dit", "lap", "refiner", "checkpoint", "unifusion", "krea 2"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=list_models(),
                    default=EMBEDDED_MODELS[0],
                    tooltip="An embedded micro model, or a file of UniFusion or Krea 2 in models/unifusion, "
                    "diffusion_models or checkpoints. Stage 1 never saw an edit: zero-shot editing is shown on it.",
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
                sockets.Fusion.Output(
                    display_name="fusion",
                    tooltip="LAP and refiner, to the nodes of those names; the file's, without LoRA.",
                ),
                io.Vae.Output(tooltip="Takes core's VAE nodes. Krea 2's is qwen_image_vae in models/vae."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model: str, dtype: str) -> str:
        path = model_path(model)
        vae = krea2_vae() if is_krea2(path) else None
        return stamp(path) if vae is None else f"{stamp(path)} {stamp(vae)}"

    @classmethod
    @within_limits
    def execute(cls, model: str, dtype: str = "default") -> io.NodeOutput:
        path = model_path(model)
        if is_krea2(path):
            from .krea2 import load

            return io.NodeOutput(*load(path, DTYPES[dtype]))
        from .weights import load_model

        return io.NodeOutput(*load_model(path, DTYPES[dtype]))


class FusionFromModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniFusionFusionFromModel",
            display_name="UniFusion Fusion from Model (Krea 2)",
            category=CATEGORY,
            description="Takes LAP and refiner out of a Krea 2 MODEL, with its LoRA and quantised weights, and lets "
            f"the MODEL accept what they fuse. {TRAINED_ON_TEXT}",
            search_aliases=["krea 2", "lap", "refiner", "txtfusion", "lora"],
            inputs=[
                io.Model.Input("model", tooltip="Krea 2 from core's Load Diffusion Model, behind its LoRA loaders.")
            ],
            outputs=[
                io.Model.Output(tooltip="The same model; takes the output of UniFusion Refine, and core's as before."),
                sockets.Fusion.Output(display_name="fusion", tooltip="LAP and refiner, to the nodes of those names."),
            ],
        )

    @classmethod
    @within_limits
    def execute(cls, model) -> io.NodeOutput:
        from .krea2 import accept_fused, fusion_of

        fusion, model = fusion_of(model), model.clone()
        accept_fused(model)
        return io.NodeOutput(model, fusion)


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


class LoadAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniFusionLoadAdapter",
            display_name="UniFusion Load Adapter (LAP)",
            category=CATEGORY,
            description="Loads a LAP adapter: LAP over many layers of the VLM, trained in front of a frozen DiT "
            "in place of the few layers that its own text encoder gives it.",
            search_aliases=["lap", "adapter", "layerwise attention pooling", "boogu", "klein", "z-image", "ideogram"],
            inputs=[
                sockets.VLM.Input("vlm", tooltip="The VLM that the adapter was trained on."),
                io.Combo.Input("adapter", options=list_adapters(), tooltip="A LAP adapter in models/unifusion."),
            ],
            outputs=[
                sockets.VLM.Output(
                    display_name="vlm",
                    tooltip="The same VLM, which also taps the layers that the adapter reads; to UniFusion Rewrite.",
                ),
                sockets.Adapter.Output(display_name="adapter", tooltip="To UniFusion Encode for Model."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, adapter: str, vlm=None) -> str:
        return stamp(adapter_path(adapter))

    @classmethod
    @within_limits
    def execute(cls, vlm, adapter: str) -> io.NodeOutput:
        from .weights import load_adapter

        loaded = load_adapter(adapter_path(adapter))
        return io.NodeOutput(vlm.for_adapter(loaded.adapter), loaded)


NODES = [LoadVLM, VLMFromCLIP, LoadModel, FusionFromModel, LoadLoRA, LoadAdapter]
