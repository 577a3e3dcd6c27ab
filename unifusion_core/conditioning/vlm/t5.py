"""T5's encoder as a source of condition tokens: prompts → its last hidden state, the baseline that reads text alone.

It stands where a `FrozenVLM` stands, as far as a text-only model can: `encode`, `encode_empty`, `tapping`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerBase, T5EncoderModel

from ..hidden_states import HiddenStates, Span
from .loading import check_weights, load_tokenizer
from .request import Request

T5_MARK = "t5-"  # with which its identity begins


class T5TextEncoder:
    """A frozen T5 encoder; its only tapped layer is the last, behind the final norm, as T5-conditioned models read it.

    identity: as `FrozenVLM.identity`. layers: the one number of its last layer. It writes nothing, so that VERIFI, its
    replay and a judge, which all begin by `prepare`, `generate` or a rewrite to encode, are told so.
    """

    family = "t5"
    prefix_cache = None  # of pictures
    image_token_ids: tuple[int, ...] = ()

    def __init__(self, model: T5EncoderModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        config = model.config
        self.num_layers, self.layers, self.width = config.num_layers, (config.num_layers,), config.d_model
        self.end, self.pad = config.eos_token_id, config.pad_token_id
        signs = torch.signbit(model.shared.weight[:64].float()).cpu().numpy().tobytes()
        self.identity = f"{T5_MARK}{config.num_layers}x{config.d_model}-{hashlib.sha256(signs).hexdigest()[:12]}"

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def to(self, device: torch.device | str) -> T5TextEncoder:
        """Moves the model; returns itself."""
        self.model.to(device)
        return self

    def token_id(self, token: str) -> int | None:
        """As `FrozenVLM.token_id`."""
        return self.tokenizer.get_vocab().get(token)

    def system_for(self, request: Request) -> str:
        """As `FrozenVLM.system_for`: none."""
        return ""

    def tapping(self, layers: Sequence[int]) -> T5TextEncoder:
        """Returns itself: there is one layer to tap.

        Raises:
            ValueError: another layer.
        """
        if tuple(layers) != self.layers:
            raise ValueError(
                f"layers {tuple(layers)}: T5 gives its last alone, expected {self.layers}; condition on the last layer"
            )
        return self

    def ids(self, prompt: str) -> list[int]:
        """A prompt's tokens and the end of the text, as T5 was trained."""
        return [*self.tokenizer(prompt, add_special_tokens=False).input_ids, self.end]

    def count_tokens(self, request: Request) -> dict:
        """As `FrozenVLM.count_tokens`."""
        self._check(request)
        total = len(self.ids(request.prompt))
        return {"total": total, "kinds": {"instruction": total}, "images": []}

    def prepare(self, requests: Sequence[Request], **_) -> NoReturn:
        """Stands where a VLM begins to write.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "T5 reads prompts and writes none: switch rewriting off (--no-rewrite; sampling off and no text at "
            "UniFusion Rewrite), or load a VLM and a model trained on it"
        )

    def encode(
        self, requests: Sequence[Request], rewrites: Sequence | None = None, *, reuse: bool = False
    ) -> HiddenStates:
        """Runs prompts through the encoder once; every token, the end too, is of the instruction.

        Args:
            reuse: has no meaning without pictures.
        Raises:
            ValueError: rewrites, or a request with images, chat text or system prompt, which T5 has no place for.
        """
        if rewrites is not None:
            self.prepare(requests)
        for row, request in enumerate(requests):
            self._check(request, row)
        rows = [self.ids(request.prompt) for request in requests]
        states, mask = self.states(rows)
        spans = tuple((Span("instruction", 0, len(row)),) for row in rows)
        positions = torch.zeros(*mask.shape, 3, device=mask.device)
        return HiddenStates(states[:, :, None], mask, positions, spans, self.layers, self.identity)

    def encode_empty(self) -> HiddenStates:
        """Encodes the empty prompt: the end alone."""
        return self.encode([Request("")])

    def _check(self, request: Request, row: int = 0) -> None:
        if request.images:
            raise ValueError(f"request {row}: T5 reads text alone; leave the {len(request.images)} images out")
        if request.system or request.template:
            raise ValueError(f"request {row}: T5 has no chat; leave the system prompt and the template out")

    @torch.no_grad()
    def states(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token ids → last hidden states [B, T, E], zero where padded on the right, and the mask [B, T]."""
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *[self.pad] * (longest - len(row))] for row in rows], device=self.device)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        mask = torch.arange(longest, device=self.device) < lengths[:, None]
        states = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return states * mask[..., None], mask


def is_t5(path: str | Path) -> bool:
    """Whether a path is a transformers folder of a T5, by its config alone."""
    try:
        config = json.loads((Path(path).expanduser() / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == "t5"


def load_t5(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    tokenizer: str | Path | None = None,
) -> T5TextEncoder:
    """Loads the encoder of a T5 and its tokenizer from a transformers folder; nothing is downloaded.

    Args:
        dtype: None keeps the file's.
        tokenizer: its folder, where that is another, as in a diffusers pipeline.
    Raises:
        ValueError: no such folder, or not a T5's.
    """
    folder = Path(folder).expanduser()
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json; expected a transformers folder of a T5 encoder")
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(folder, **local)
        if config.model_type != "t5":
            raise ValueError(f"it holds a {config.model_type}, expected a t5")
        check_weights(folder)
        model, report = T5EncoderModel.from_pretrained(
            folder, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True, **local
        )
        if report["missing_keys"]:
            raise ValueError(f"its weights lack {sorted(report['missing_keys'])[0]}")
        words = load_tokenizer(Path(tokenizer or folder).expanduser(), config)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: not a T5 encoder: {' '.join(str(error).split())[:200]}") from error
    return T5TextEncoder(model.to(device), words)
