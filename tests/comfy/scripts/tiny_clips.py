"""CLIPs of core's own classes at a few kilobytes per layer, with random weights and core's own tokenizers."""

import io

import comfy.sd
import torch
from comfy.text_encoders import ideogram4, krea2, llama, lt, lumina2, qwen3vl, qwen_image, qwen_vl, z_image

SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=7, num_attention_heads=2, num_key_value_heads=1)
NAMES = ("qwen3vl_4b", "qwen3vl_8b", "qwen25_7b", "qwen3_4b", "gemma3_4b_vision", "gemma3_12b", "")


def shrink_cores_classes() -> None:
    """Sizes that core fixes in its modules and not in a config."""
    for sizes in qwen3vl.QWEN3VL_VISION.values():
        sizes.update(hidden_size=32, intermediate_size=48, depth=4, deepstack_visual_indexes=[0, 1, 2])
    qwen3vl.QWEN3VL_VISION_COMMON.update(num_heads=2, num_position_embeddings=64)
    llama.GEMMA3_VISION_CONFIG.update(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=4
    )
    for config in (llama.Gemma3_12B_Config, llama.Gemma3_4B_Vision_Config):
        config.mm_tokens_per_image = 16
        config.sliding_attention = [24, 24, 24, 24, 24, False]
    whole = qwen_vl.Qwen2VLVisionTransformer

    def small(hidden_size, output_hidden_size, **kwargs):
        tower = whole(32, output_hidden_size, intermediate_size=48, num_heads=2, num_layers=2, **kwargs)
        tower.fullatt_block_indexes = [1]
        return tower

    qwen_vl.Qwen2VLVisionTransformer = small


def make(kind: str, dtype=torch.float32, **sizes) -> comfy.sd.CLIP:
    class Target:
        params = {}

    Target.clip, Target.tokenizer = {
        "qwen3vl": lambda: (krea2.te(), krea2.Krea2Tokenizer),
        "qwen25vl": lambda: (qwen_image.te(), qwen_image.QwenImageTokenizer),
        "gemma3": lambda: (lt.gemma3_te(), lt.Gemma3_12BTokenizer),
        "gemma3 of ltx": lambda: (lt.ltxav_te(), lt.LTXAVGemmaTokenizer),
        "gemma3 4b": lambda: (lumina2.te(model_type="gemma3_4b_vision"), lumina2.NTokenizer),
        "qwen3": lambda: (z_image.te(), z_image.ZImageTokenizer),
        "ideogram": lambda: (ideogram4.te(), ideogram4.Ideogram4Tokenizer),
    }[kind]()
    data = {"spiece_model": gemma_model()} if kind.startswith("gemma3") else {}
    options = {"dtype": dtype} | {f"{name}_model_config": SIZES | sizes for name in NAMES}
    clip = comfy.sd.CLIP(Target, tokenizer_data=data, model_options=options)
    fill(clip.cond_stage_model)
    return clip


def fill(model: torch.nn.Module, seed: int = 0) -> None:
    numbers = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                noise = torch.randn(parameter.shape, generator=numbers)
                if parameter.ndim > 1:
                    parameter.copy_(noise * 0.5 / parameter[0].numel() ** 0.5)
                else:  # a norm's scale, which Gemma counts from 1, or a bias
                    scale = 0 if name == "bias" or getattr(module, "add", False) else 1
                    parameter.copy_(scale + 0.1 * noise)


def gemma_model() -> torch.Tensor:
    """A SentencePiece model with Gemma's control tokens in their places."""
    import sentencepiece

    words = ["a big red heart on the left", "the small blue star at the top right", "you rewrite what a picture shows"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words * 30),
        model_writer=model,
        vocab_size=450,
        model_type="bpe",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        minloglevel=2,
        user_defined_symbols=[f"<unused{i}>" for i in range(4, 105)] + ["<start_of_turn>", "<end_of_turn>"],
    )
    return torch.frombuffer(bytearray(model.getvalue()), dtype=torch.uint8)
