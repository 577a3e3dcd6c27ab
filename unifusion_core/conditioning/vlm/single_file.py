"""ComfyUI's single-file text encoders: tensor names and shapes -> transformers' config and names.

Such a file holds neither config nor tokenizer. Sizes are read from shapes; what shapes do not tell (rotary base, heads
of the vision tower, DeepStack's layers, ...) is a constant of the published models, listed here, or comes from a
`config.json` that lies beside the tokenizer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor
from transformers import (
    Gemma3Config,
    Gemma3TextConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen3Config,
    Qwen3VLConfig,
)

NOT_WEIGHTS = {"spiece_model", "tokenizer_json", "tekken_model"}  # tokenizers that ComfyUI stores as tensors
HEAD_DIM = 128  # of every published Qwen2.5-VL, which has no q_norm to read it from
VISION_HEADS = 16  # of every published Qwen2.5-VL, Qwen3-VL and Gemma-3
DEEPSTACK = {24: (5, 11, 17), 27: (8, 16, 24)}  # by depth: Qwen3-VL-4B and smaller; 8B and larger
# widths of which the published model has an output head of its own
UNTIED = {"qwen2_5_vl": {3584, 5120, 8192}, "qwen3_vl": {4096, 5120}, "qwen3": {4096, 5120}}
TEXT_ONLY_GEMMA = {640, 1152}  # 270M and 1B
# first match decides; a name is looked for at the end of the file's names
SIGNS = (
    ("qwen3_vl", "visual.deepstack_merger_list.0.norm.weight"),
    ("qwen2_5_vl", "visual.merger.ln_q.weight"),
    ("gemma3", "multi_modal_projector.mm_input_projection_weight"),
)
LAYER = "model.layers.0."
# (pattern, replacement), first match decides; the right-hand sides are transformers' module names
RENAMED = {
    "qwen": (
        (r"^model\.(language_model|visual)\.", r"model.\1."),
        (r"^(model\.)?lm_head\.", "lm_head."),
        (r"^visual\.", "model.visual."),
        (r"^model\.", "model.language_model."),
    ),
    "gemma3": (
        (r"^(language_model\.|model\.)?lm_head\.", "lm_head."),
        (r"^(model\.)?multi_modal_projector\.", "model.multi_modal_projector."),
        (r"^(model\.)?(vision_tower\.)?vision_model\.", "model.vision_tower."),
        (r"^model\.(language_model|vision_tower)\.", r"model.\1."),
        (r"^(language_model\.)?model\.", "model.language_model."),
    ),
    "text": ((r"^(model\.)?lm_head\.", "lm_head."),),
}
FOLDER = "put the config.json of its transformers folder beside the tokenizer files"


def recognise(names: Iterable[str]) -> str:
    """Returns transformers' model_type for the tensor names of a file.

    Raises:
        ValueError: the names are those of no language model, or of one that is not known.
    """
    names = set(names)
    for model_type, sign in SIGNS:
        if any(name.endswith(sign) for name in names):
            return model_type
    q_norm, gemma = (LAYER + leaf in names for leaf in ("self_attn.q_norm.weight", "pre_feedforward_layernorm.weight"))
    if LAYER + "self_attn.q_proj.weight" in names and (q_norm or not gemma):
        biased = LAYER + "self_attn.q_proj.bias" in names
        return ("gemma3_text" if gemma else "qwen3") if q_norm else "qwen2" if biased else "llama"
    if any("lora_" in name for name in names):
        raise ValueError("this is a LoRA and not a model; load the model it was made for")
    first = min(names - NOT_WEIGHTS, default="nothing")
    raise ValueError(
        f"tensors such as {first} are those of no language model known here; accepted are ComfyUI's text encoders of "
        "Qwen2.5-VL, Qwen3-VL, Gemma-3, Qwen3 and Llama"
    )


def renamed(tensors: Mapping[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """Returns the tensors under the names of transformers' modules, without ComfyUI's tokenizer."""
    rules = RENAMED["qwen" if model_type.endswith("_vl") else "gemma3" if model_type == "gemma3" else "text"]
    return {_rename(name, rules): tensor for name, tensor in tensors.items() if name not in NOT_WEIGHTS}


def config_from(tensors: Mapping[str, Tensor], model_type: str) -> PreTrainedConfig:
    """Builds the config of a published architecture at the size the shapes tell.

    Args:
        tensors: by transformers' names, dequantised.
    Raises:
        ValueError: a tensor that tells a size is missing, or the architecture has constants that shapes do not tell.
    """
    if model_type not in PRESETS:
        raise ValueError(
            f"this is a {model_type} model, whose versions differ in rotary scaling and not in shapes; {FOLDER}"
        )
    if "lm_head.weight" not in tensors:
        width = _shape(tensors, f"{_text_prefix(model_type)}embed_tokens.weight")[1]
        if width in UNTIED.get(model_type, ()):
            raise ValueError("lm_head.weight is missing, without which this size cannot write; load a complete file")
    config = PRESETS[model_type](tensors)
    config.tie_word_embeddings = "lm_head.weight" not in tensors
    return config


def fits(config: PreTrainedConfig, tensors: Mapping[str, Tensor], model_type: str) -> bool:
    """Says whether a folder's config is of these weights' architecture and size."""
    text, prefix = config.get_text_config(), _text_prefix(model_type)
    sizes = text.hidden_size, text.num_hidden_layers
    return config.model_type == model_type and sizes == (
        _shape(tensors, f"{prefix}embed_tokens.weight")[1],
        _count(tensors, f"{prefix}layers"),
    )


def _rename(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        changed, hits = re.subn(pattern, replacement, name)
        if hits:
            return changed
    return name


def _text_prefix(model_type: str) -> str:
    return "model.language_model." if model_type in ("gemma3", "qwen2_5_vl", "qwen3_vl") else "model."


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    if name not in tensors:
        raise ValueError(f"{name} is missing; the file is incomplete, download it again")
    return tuple(tensors[name].shape)


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Number of `prefix.0.`, `prefix.1.`, ...; one that is left out shows as missing weights."""
    found = [match[1] for name in tensors if (match := re.match(re.escape(prefix) + r"\.(\d+)\.", name))]
    return max(map(int, found), default=-1) + 1


def _text(tensors: Mapping[str, Tensor], prefix: str) -> dict:
    layer = f"{prefix}layers.0."
    vocabulary, width = _shape(tensors, f"{prefix}embed_tokens.weight")
    norm = tensors.get(f"{layer}self_attn.q_norm.weight")
    head = HEAD_DIM if norm is None else norm.shape[0]
    queries, keys = (_shape(tensors, f"{layer}self_attn.{name}_proj.weight")[0] for name in "qk")
    if queries % head or keys % head:
        raise ValueError(f"{queries} query and {keys} key channels are not heads of {head}; {FOLDER}")
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": _shape(tensors, f"{layer}mlp.gate_proj.weight")[0],
        "num_hidden_layers": _count(tensors, f"{prefix}layers"),
        "num_attention_heads": queries // head,
        "num_key_value_heads": keys // head,
        "rms_norm_eps": 1e-6,
    } | ({} if norm is None else {"head_dim": head})


def _qwen_vision(tensors: Mapping[str, Tensor], merged: str, norm: str) -> dict:
    """Sizes of a Qwen tower; `merged` takes the patches that become one token, `norm` is as wide as one patch."""
    width, channels, frames, patch, _ = _shape(tensors, "model.visual.patch_embed.proj.weight")
    group = _shape(tensors, merged)[1] // _shape(tensors, norm)[0]
    return {
        "depth": _count(tensors, "model.visual.blocks"),
        "hidden_size": width,
        "num_heads": VISION_HEADS,
        "in_channels": channels,
        "temporal_patch_size": frames,
        "patch_size": patch,
        "spatial_merge_size": math.isqrt(group),
    }


def _qwen25_vl(tensors: Mapping[str, Tensor]) -> PreTrainedConfig:
    merger = "model.visual.merger."
    vision = _qwen_vision(tensors, f"{merger}mlp.0.weight", f"{merger}ln_q.weight") | {
        "intermediate_size": _shape(tensors, "model.visual.blocks.0.mlp.gate_proj.weight")[0],
        "out_hidden_size": _shape(tensors, f"{merger}mlp.2.weight")[0],
        "fullatt_block_indexes": [7, 15, 23, 31],
        "window_size": 112,
        "tokens_per_second": 2,
    }
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text = _text(tensors, "model.language_model.") | {"max_position_embeddings": 128000, "rope_parameters": rope}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision)


def _qwen3_vl(tensors: Mapping[str, Tensor]) -> PreTrainedConfig:
    merger = "model.visual.merger."
    vision = _qwen_vision(tensors, f"{merger}linear_fc1.weight", f"{merger}norm.weight") | {
        "intermediate_size": _shape(tensors, "model.visual.blocks.0.mlp.linear_fc1.weight")[0],
        "out_hidden_size": _shape(tensors, f"{merger}linear_fc2.weight")[0],
        "num_position_embeddings": _shape(tensors, "model.visual.pos_embed.weight")[0],
    }
    depth, count = vision["depth"], _count(tensors, "model.visual.deepstack_merger_list")
    vision["deepstack_visual_indexes"] = DEEPSTACK.get(depth, ())
    if len(vision["deepstack_visual_indexes"]) != count:
        raise ValueError(
            f"{count} DeepStack mergers in a vision tower of {depth} layers do not tell where they go "
            f"(known are towers of {' and '.join(map(str, DEEPSTACK))} layers); {FOLDER}"
        )
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    text = _text(tensors, "model.language_model.") | {"max_position_embeddings": 262144, "rope_parameters": rope}
    return Qwen3VLConfig(text_config=text, vision_config=vision)


def _gemma3_sizes(tensors: Mapping[str, Tensor], prefix: str) -> dict:
    sizes = _text(tensors, prefix)
    return sizes | {
        "max_position_embeddings": 131072,
        "sliding_window": 1024,
        # the 27B alone divides by its width per head
        "query_pre_attn_scalar": 168 if sizes["hidden_size"] == 5376 else 256,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }


def _gemma3(tensors: Mapping[str, Tensor]) -> PreTrainedConfig:
    tower = "model.vision_tower."
    width, channels, patch, _ = _shape(tensors, f"{tower}embeddings.patch_embedding.weight")
    vision = {
        "hidden_size": width,
        "num_channels": channels,
        "patch_size": patch,
        "image_size": patch * math.isqrt(_shape(tensors, f"{tower}embeddings.position_embedding.weight")[0]),
        "intermediate_size": _shape(tensors, f"{tower}encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": _count(tensors, f"{tower}encoder.layers"),
        "num_attention_heads": VISION_HEADS,
        "vision_use_head": False,
    }
    return Gemma3Config(text_config=_gemma3_sizes(tensors, "model.language_model."), vision_config=vision)


def _gemma3_text(tensors: Mapping[str, Tensor]) -> PreTrainedConfig:
    sizes = _gemma3_sizes(tensors, "model.")
    if sizes["hidden_size"] in TEXT_ONLY_GEMMA:
        raise ValueError(f"Gemma-3 of width {sizes['hidden_size']} has a rotary scaling of its own; {FOLDER}")
    return Gemma3TextConfig(**sizes)


def _qwen3(tensors: Mapping[str, Tensor]) -> PreTrainedConfig:
    rope = {"rope_type": "default", "rope_theta": 1e6}
    return Qwen3Config(**_text(tensors, "model."), max_position_embeddings=40960, rope_parameters=rope)


PRESETS: dict[str, Callable[[Mapping[str, Tensor]], PreTrainedConfig]] = {
    "qwen2_5_vl": _qwen25_vl,
    "qwen3_vl": _qwen3_vl,
    "gemma3": _gemma3,
    "gemma3_text": _gemma3_text,
    "qwen3": _qwen3,
}
