"""T5's encoder as a source of condition tokens: prompts → its last hidden state, the baseline that reads text alone.

It stands where a `FrozenVLM` stands, as far as a text-only model can: `encode`, `encode_empty`, `tapping`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, T5EncoderModel

from ..hidden_states import HiddenStates, Span
from .base import Request


class T5TextEncoder:
    """A frozen T5 encoder; its only tapped layer is the last, behind the final norm, as T5-conditioned models read it.

    identity: as `FrozenVLM.identity`. layers: the one number of its last layer.
    """

    family = "t5"

    def __init__(self, model: T5EncoderModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        config = model.config
        self.layers, self.width = (config.num_layers,), config.d_model
        self.end, self.pad = config.eos_token_id, config.pad_token_id
        signs = torch.signbit(model.shared.weight[:64].float()).cpu().numpy().tobytes()
        self.identity = f"t5-{config.num_layers}x{config.d_model}-{hashlib.sha256(signs).hexdigest()[:12]}"

    @property
    def device(self) -> torch.device:
        return self.model.device

    def tapping(self, layers: Sequence[int]) -> T5TextEncoder:
        """Returns itself: there is one layer to tap.

        Raises:
            ValueError: another layer.
        """
        if tuple(layers) != self.layers:
            raise ValueError(f"layers {tuple(layers)}: T5 gives its last alone, expected {self.layers}")
        return self

    def ids(self, prompt: str) -> list[int]:
        """A prompt's tokens and the end of the text, as T5 was trained."""
        return [*self.tokenizer(prompt, add_special_tokens=False).input_ids, self.end]

    def encode(self, requests: Sequence[Request]) -> HiddenStates:
        """Runs prompts through the encoder once; every token, the end too, is of the instruction.

        Raises:
            ValueError: a request with images, or with a chat text or system prompt, which T5 has no place for.
        """
        for row, request in enumerate(requests):
            if request.images:
                raise ValueError(f"request {row}: T5 reads text alone; leave the {len(request.images)} images out")
            if request.system or request.template:
                raise ValueError(f"request {row}: T5 has no chat; leave the system prompt and the template out")
        rows = [self.ids(request.prompt) for request in requests]
        states, mask = self.states(rows)
        spans = tuple((Span("instruction", 0, len(row)),) for row in rows)
        positions = torch.zeros(*mask.shape, 3, device=mask.device)
        return HiddenStates(states[:, :, None], mask, positions, spans, self.layers, self.identity)

    def encode_empty(self) -> HiddenStates:
        """Encodes the empty prompt: the end alone."""
        return self.encode([Request("")])

    @torch.no_grad()
    def states(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token ids → last hidden states [B, T, E], zero where padded on the right, and the mask [B, T]."""
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *[self.pad] * (longest - len(row))] for row in rows], device=self.device)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        mask = torch.arange(longest, device=self.device) < lengths[:, None]
        states = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return states * mask[..., None], mask


def load_t5(folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> T5TextEncoder:
    """Loads the encoder of a T5 and its tokenizer from a transformers folder; nothing is downloaded.

    Args:
        dtype: None keeps the file's.
    Raises:
        ValueError: no such folder, or not a T5's.
    """
    folder = Path(folder).expanduser()
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json; expected a transformers folder of a T5 encoder")
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        kind = AutoConfig.from_pretrained(folder, **local).model_type
        if kind != "t5":
            raise ValueError(f"it holds a {kind}, expected a t5")
        model, report = T5EncoderModel.from_pretrained(
            folder, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True, **local
        )
        if report["missing_keys"]:
            raise ValueError(f"its weights lack {sorted(report['missing_keys'])[0]}")
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: not a T5 encoder: {' '.join(str(error).split())[:200]}") from error
    return T5TextEncoder(model.to(device), tokenizer)
