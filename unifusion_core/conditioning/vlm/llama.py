"""Text-only models (transformers' own classes): Llama, one of the paper's encoders, and Qwen and Gemma without eyes."""

from __future__ import annotations

from .base import FrozenVLM
from .templates import CHATML, GEMMA, LLAMA3


class Llama(FrozenVLM):
    """Llama 3: takes no images."""

    family = "llama"
    end_of_turn = ("<|eot_id|>",)
    default_template = LLAMA3
    template_options = {"date_string": "26 Jul 2024"}  # the template's own default; 3.2 would write today's date


class QwenText(FrozenVLM):
    """Qwen2 and Qwen3: takes no images."""

    family = "qwen"
    end_of_turn = ("<|im_end|>",)
    default_template = CHATML


class GemmaText(FrozenVLM):
    """The text part of Gemma-3: takes no images."""

    family = "gemma3_text"
    end_of_turn = ("<end_of_turn>",)
    default_template = GEMMA
