"""States of training conditions, asked of the VLM once and kept on disk under the hash of what they came from.

They are large: 2 · L · E bytes a token. For unifusion-8b that is 65 kB, so 6.5 MB for a caption of 100 tokens and
165 MB for a picture of 9 tiles and its thumbnail. Worth it for captions that are seen in many epochs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..checkpoint import load_tensors, save_checkpoint
from ..conditioning.vlm import FrozenVLM, T5TextEncoder
from .asked import Asked, Kind, PromptTeacher, Teacher
from .samples import Texts

KEPT = torch.bfloat16  # the range of float32, which some VLMs need; nothing is lost of a VLM that computes in bfloat16
SAMPLED = 1024  # values of each weight that tell one VLM from another


@dataclass(frozen=True)
class Known(Asked):
    """A row with its key and, where they are kept already, its states [T, L, E] and positions [T, 3]."""

    key: str = ""
    found: tuple[Tensor, Tensor] | None = None


class KeptStates:
    """A teacher with a memory. Fresh states are rounded like kept ones, so that a run is the same with both."""

    def __init__(self, teacher: Teacher | PromptTeacher, vlm: FrozenVLM | T5TextEncoder, folder: Path) -> None:
        self.teacher, self.vlm = teacher, vlm
        self.folder = folder / vlm_digest(vlm)

    def ask(self, kind: Kind, texts: Texts, picture: Image.Image | None, rng: Random) -> Known:
        """As the teacher's; what is kept is read here, in the thread that reads the sample."""
        asked = self.teacher.ask(kind, texts, picture, rng)
        key = self.key(asked)
        return Known(asked.kind, asked.request, asked.rewrite, key, self._find(key))

    def states(self, rows: Sequence[Known]) -> tuple[Tensor, Tensor, Tensor]:
        """As the teacher's, with states in bfloat16."""
        fresh: dict[str, tuple[Tensor, Tensor]] = {}
        for row in rows:
            if row.found is None and row.key not in fresh:
                fresh[row.key] = self._find(row.key) or self._compute(row)  # an earlier step may have kept it since
        states, positions = zip(*(row.found or fresh[row.key] for row in rows), strict=True)
        lengths = torch.tensor([len(each) for each in states])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        return pad_sequence(states, batch_first=True), mask, pad_sequence(positions, batch_first=True)

    def key(self, asked: Asked) -> str:
        """The hash of the words, the pixels, and how both are asked."""
        digest, request = hashlib.sha256(), asked.request
        said = {"kind": asked.kind, "rewrite": asked.rewrite}
        if request is not None:
            said |= {name: value for name, value in vars(request).items() if name != "images"}
            said["system"] = self.vlm.system_for(request)
        digest.update(json.dumps(said, sort_keys=True).encode())
        for image in request.images if request else ():
            digest.update(f"{image.mode} {image.width}x{image.height} ".encode() + image.tobytes())
        return digest.hexdigest()

    def _compute(self, row: Known) -> tuple[Tensor, Tensor]:
        """Asks by itself: in a batch the last digits would depend on the neighbours."""
        states, mask, positions = self.teacher.states([Asked(row.kind, row.request, row.rewrite)])
        kept = states[0, mask[0]].to("cpu", KEPT), positions[0, mask[0]].cpu()
        save_checkpoint(self._path(row.key), {"states": kept[0], "positions": kept[1]}, {"kind": row.kind})
        return kept

    def _find(self, key: str) -> tuple[Tensor, Tensor] | None:
        if not (path := self._path(key)).is_file():
            return None
        tensors = load_tensors(path)
        return tensors["states"].clone(), tensors["positions"].clone()  # read now, not when they are first used

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def vlm_digest(vlm: FrozenVLM | T5TextEncoder) -> str:
    """Of the VLM and of its weights, because its `identity` is that of its fine-tunes as well."""
    said = [vlm.identity, vlm.layers, str(vlm.dtype), getattr(vlm, "chat_template", None)]
    return sampled_digest(vlm.model, said)


def sampled_digest(model: nn.Module, said: Any) -> str:
    """Of what is said of a large model (JSON-able) and of a few values of each of its weights."""
    digest = hashlib.sha256(json.dumps(said, default=str).encode())
    for name, weight in sorted(model.named_parameters()):
        values = weight.detach().flatten()
        values = values[:: max(1, len(values) // SAMPLED)].float().cpu().numpy()
        digest.update(name.encode() + values.tobytes())
    return digest.hexdigest()[:16]
