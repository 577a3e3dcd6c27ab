"""Our pipeline against diffusers' Krea2Pipeline: the same random weights, the same picture, seconds of CPU time.

diffusers pads a prompt to 512 tokens; here it is given the prompt's own length, so that both do the same work.
"""

from __future__ import annotations

import shutil
import tempfile
from atexit import register
from functools import cache
from pathlib import Path

import diffusers
import torch

from ..conditioning.vlm import Request
from ..diffusion.dit import pack
from ..diffusion.sampler import initial_noise
from ..pipeline import UniFusion, load_model
from .bench_wide import _cpu_seconds

PROMPT = "a red heart left of a blue star"
SIZE, STEPS, GUIDANCE = 256, 4, 4.5  # guidance in diffusers' way
WIDTH = 64  # of the VLM, which must not count beside the DiT
TOLERANCE = 1e-4  # of the picture, in 0..1
CONTROL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def against_diffusers(repeats: int) -> float | None:
    """Our time from prompt to latents over that of diffusers' pipeline; None where diffusers is too old to have one.

    Raises:
        ValueError: the two pictures differ by more than 1e-4.
    """
    if not hasattr(diffusers, "Krea2Pipeline"):
        return None
    theirs, folder = _pipeline()
    ours = load_model(folder)
    length = int(theirs.get_text_hidden_states(PROMPT)[1].sum())

    def draw() -> torch.Tensor:
        ours._empty = None  # the pipeline, too, reads the empty prompt for each picture
        conditions = ours.prepare([Request(PROMPT)], rewriting=False)
        return ours.sample(conditions, steps=STEPS, guidance=1 + GUIDANCE, size=(SIZE, SIZE))

    def draw_theirs(kind: str = "latent") -> torch.Tensor:
        return theirs(
            PROMPT,
            width=SIZE,
            height=SIZE,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            latents=_noise(ours),
            max_sequence_length=length,
            output_type=kind,
        ).images

    difference = (ours.vae.decode(draw()) - draw_theirs("pt")).abs().max().item()
    if not difference <= TOLERANCE:
        raise ValueError(f"our picture differs from diffusers' by {difference:g}; expected at most {TOLERANCE:g}")
    mine, other = _cpu_seconds(draw, draw_theirs, repeats=repeats)
    return mine / other


def _noise(model: UniFusion) -> torch.Tensor:
    return pack(initial_noise((1, *model.latent_shape((SIZE, SIZE))), 0), model.spec.dit.patch_size)


@cache
def _pipeline():
    """diffusers' pipeline with random weights, and the folder it was saved to, which is removed when we end."""
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    transformer = diffusers.Krea2Transformer2DModel(
        num_layers=6,
        attention_head_dim=64,
        num_attention_heads=6,
        num_key_value_heads=3,
        intermediate_size=1024,
        text_hidden_dim=WIDTH,
        text_num_attention_heads=4,
        text_num_key_value_heads=4,
        text_intermediate_size=128,
        axes_dims_rope=(16, 24, 24),
    )
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    pipeline = diffusers.Krea2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400),
        vae=diffusers.AutoencoderKLQwenImage(base_dim=8),
        text_encoder=_text_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=transformer,
    )
    folder = Path(tempfile.mkdtemp(prefix="unifusion-bench-"))
    register(shutil.rmtree, folder, ignore_errors=True)
    pipeline.save_pretrained(folder)
    # the numbers of Qwen's own tokenizer are built in
    pipeline.prompt_template_encode_start_idx = len(tokenizer(pipeline.prompt_template_encode_prefix).input_ids)
    pipeline.prompt_template_encode_num_suffix_tokens = len(tokenizer(pipeline.prompt_template_encode_suffix).input_ids)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, folder


def _tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<pad>", *CONTROL, "system", "user", "assistant", *dict.fromkeys(PROMPT.split())]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": CONTROL[1]}
    return PreTrainedTokenizerFast(tokenizer_object=plain, additional_special_tokens=list(CONTROL), **special)


def _text_encoder(tokenizer):
    from transformers import Qwen3VLConfig, Qwen3VLModel

    ids = tokenizer.get_vocab()
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(ids),
            "hidden_size": WIDTH,
            "num_hidden_layers": 36,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 128,
            "initializer_range": 0.1,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 3,
            "hidden_size": 16,
            "num_heads": 2,
            "intermediate_size": 32,
            "out_hidden_size": WIDTH,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1, 2],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    return Qwen3VLModel(config).eval()
