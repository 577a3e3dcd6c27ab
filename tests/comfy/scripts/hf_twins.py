"""transformers' own models with the weights of the tiny CLIPs beside."""

import torch
from tiny_clips import SIZES
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

QWEN = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
QWEN_VISION = dict(
    hidden_size=32, intermediate_size=48, num_heads=2, spatial_merge_size=2, temporal_patch_size=2, in_channels=3
)


def twin(kind: str, transformer: torch.nn.Module, head: torch.Tensor | None = None, eps=1e-5) -> torch.nn.Module:
    """A transformers model for the `transformer` of a tiny CLIP; `eps` of SigLIP's norms is core's, not Google's."""
    ours = transformer.model.config
    text = SIZES | dict(
        hidden_size=ours.hidden_size,
        vocab_size=ours.vocab_size,
        rms_norm_eps=ours.rms_norm_eps,
        max_position_embeddings=4096,
        tie_word_embeddings=head is None,
    )
    tied = {"tie_word_embeddings": head is None}
    if kind == "qwen3vl":
        rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
        vision = QWEN_VISION | dict(
            depth=4, patch_size=16, deepstack_visual_indexes=[0, 1, 2], num_position_embeddings=64
        )
        config = Qwen3VLConfig(
            text_config=text | {"rope_parameters": rope, "head_dim": 128},
            vision_config=vision | {"out_hidden_size": ours.hidden_size},
            **tied,
            **QWEN,
        )
        model = Qwen3VLForConditionalGeneration(config)
    elif kind == "qwen25vl":
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
        vision = QWEN_VISION | dict(depth=2, patch_size=14, window_size=112, fullatt_block_indexes=[1])
        config = Qwen2_5_VLConfig(
            text_config=text | {"rope_parameters": rope},
            vision_config=vision | {"out_hidden_size": ours.hidden_size},
            **tied,
            **QWEN,
        )
        model = Qwen2_5_VLForConditionalGeneration(config)
    else:
        rope = {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
        types = ["sliding_attention" if i % 6 < 5 else "full_attention" for i in range(SIZES["num_hidden_layers"])]
        config = Gemma3Config(
            text_config=text
            | dict(rope_parameters=rope, head_dim=256, query_pre_attn_scalar=256, sliding_window=24, layer_types=types),
            vision_config=dict(ours.vision_config) | {"vision_use_head": False, "layer_norm_eps": eps},
            mm_tokens_per_image=16,
            boi_token_index=255999,
            eoi_token_index=256000,
            image_token_index=262144,
            **tied,
        )
        model = Gemma3ForConditionalGeneration(config)
    names = set(model.state_dict())
    weights = {_name(name, names): tensor for name, tensor in transformer.state_dict().items()}
    weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"] if head is None else head
    model.load_state_dict(weights)
    return model.eval()


def _name(core: str, names: set[str]) -> str:
    """transformers' name of one of core's tensors."""
    for ours, theirs in (
        ("model.", "model.language_model."),
        ("visual.", "model.visual."),
        ("vision_model.", "model.vision_tower."),
        ("vision_model.vision_model.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ):
        if core.startswith(ours) and theirs + core.removeprefix(ours) in names:
            return theirs + core.removeprefix(ours)
    raise KeyError(f"{core} has no place in transformers' model")
