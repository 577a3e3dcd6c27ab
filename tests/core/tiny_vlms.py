"""Tiny random models of transformers' own classes, one per VLM family, each with a word-level tokenizer."""

import functools

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from unifusion_core.conditioning.vlm import FAMILIES, templates
from unifusion_core.conditioning.vlm.general import GeneralVLM

WORDS = (
    "system user assistant model describe the picture in detail a an red blue green heart star circle on gray left of"
)
CHATML = ["<|im_start|>", "<|im_end|>"]
QWEN = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
CONTROL = {
    "internvl": [*CHATML, "<img>", "</img>", "<IMG_CONTEXT>"],
    "gemma3": ["<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"],
    "qwen2_5_vl": [*CHATML, *QWEN],
    "qwen3_vl": [*CHATML, *QWEN],
    "llama": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "mistral": CHATML,
    "llava": [*CHATML, "<image>"],
}
END = {"gemma3": "<end_of_turn>", "llama": "<|eot_id|>"}
NUM_LAYERS, WIDTH = 7, 32


def tokenizer_of(family: str, template: bool = True) -> PreTrainedTokenizerFast:
    control = CONTROL[family]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<pad>", "<bos>", *control, "\n", *WORDS.split()])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token=END.get(family, "<|im_end|>"),
        additional_special_tokens=control,
    )
    if template:
        tokenizer.chat_template = {"gemma3": templates.GEMMA, "llama": templates.LLAMA3}.get(family, templates.CHATML)
    return tokenizer


def _text(vocabulary: int, **more) -> dict:
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 64,
        "initializer_range": 0.2,
        "max_position_embeddings": 1024,
        "pad_token_id": 1,
    }
    return sizes | more


def _qwen_vision(**more) -> dict:
    sizes = {"depth": 3, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": WIDTH}
    return sizes | {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "initializer_range": 0.2} | more


def model_of(family: str, tokenizer: PreTrainedTokenizerFast, seed: int = 0):
    ids, size = tokenizer.get_vocab(), len(tokenizer)
    siglip = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if family == "internvl":
        config = InternVLConfig(
            vision_config=siglip | {"image_size": 32, "patch_size": 8},
            text_config=Qwen2Config(**_text(size)),
            image_token_id=ids["<IMG_CONTEXT>"],
            image_seq_length=4,
        )
        cls = InternVLForConditionalGeneration
    elif family == "gemma3":
        types = ["sliding_attention", "sliding_attention", "full_attention"]
        config = Gemma3Config(
            vision_config=siglip | {"image_size": 32, "patch_size": 8, "vision_use_head": False},
            text_config=Gemma3TextConfig(
                **_text(size, query_pre_attn_scalar=16, sliding_window=9, layer_types=(types * NUM_LAYERS)[:NUM_LAYERS])
            ),
            mm_tokens_per_image=4,
            boi_token_index=ids["<start_of_image>"],
            eoi_token_index=ids["<end_of_image>"],
            image_token_index=ids["<image_soft_token>"],
        )
        cls = Gemma3ForConditionalGeneration
    elif family in ("qwen2_5_vl", "qwen3_vl"):
        named = {
            "image_token_id": ids["<|image_pad|>"],
            "video_token_id": ids["<|video_pad|>"],
            "vision_start_token_id": ids["<|vision_start|>"],
            "vision_end_token_id": ids["<|vision_end|>"],
        }
        if family == "qwen3_vl":
            vision = _qwen_vision(deepstack_visual_indexes=[0, 1, 2], num_position_embeddings=16)
            text = _text(size, rope_parameters=rope | {"mrope_section": [4, 2, 2], "mrope_interleaved": True})
            config, cls = (
                Qwen3VLConfig(vision_config=vision, text_config=text, **named),
                Qwen3VLForConditionalGeneration,
            )
        else:
            vision = _qwen_vision(window_size=16, fullatt_block_indexes=[1])
            text = _text(size, rope_parameters=rope | {"mrope_section": [4, 2, 2]})
            del text["head_dim"]
            config = Qwen2_5_VLConfig(vision_config=vision, text_config=text, **named)
            cls = Qwen2_5_VLForConditionalGeneration
    elif family == "llava":
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(**siglip, image_size=32, patch_size=8, projection_dim=16),
            text_config=LlamaConfig(**_text(size)),
            image_token_index=ids["<image>"],
            image_seq_length=16,
        )
        cls = LlavaForConditionalGeneration
    elif family == "mistral":
        config, cls = MistralConfig(**_text(size), sliding_window=9), MistralForCausalLM
    else:
        config, cls = LlamaConfig(**_text(size)), LlamaForCausalLM
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    torch.manual_seed(seed)
    model = cls(config)
    for name, weight in model.named_parameters():
        if any(part in name for part in ("visual", "vision_tower", "multi_modal_projector")) and weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)  # so that pictures count
    model.lm_head.weight.data[: ids["\n"] + 1] = 0  # so that a random model mostly writes words
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model.eval()


OPTIONS = {"qwen2_5_vl": {"tile_side": 2, "least_pixels": 64}, "qwen3_vl": {"tile_side": 2, "least_pixels": 64}}


@functools.cache
def tiny_vlm(family: str, attention: str = "sdpa", layers: tuple[int, ...] | None = None):
    """Returns a FrozenVLM of the family; shared between tests, so leave it as it is."""
    tokenizer = tokenizer_of(family)
    model = model_of(family, tokenizer)
    model.set_attn_implementation(attention)
    options = {"processor": llava_processor(tokenizer)} if family == "llava" else OPTIONS.get(family, {})
    return FAMILIES.get(family, GeneralVLM)(model, tokenizer, layers=layers, **options)


def llava_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return LlavaProcessor(
        pixels, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
