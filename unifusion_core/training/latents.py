"""Latents of training pictures, computed once and kept on disk under the hash of what they came from."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..checkpoint import load_tensors, save_checkpoint

KEPT = torch.float16  # fresh latents are rounded like kept ones, so that a run is the same with and without them


class LatentCache:
    """Pictures → latents [C, h, w] by a frozen VAE. `folder` None keeps nothing."""

    def __init__(self, vae: nn.Module, folder: Path | None) -> None:
        self.vae = vae
        self.folder = None if folder is None else folder / vae_digest(vae)

    def key(self, picture: bytes, size: tuple[int, int]) -> str:
        return hashlib.sha256(f"{size[0]}x{size[1]} ".encode() + picture).hexdigest()

    def find(self, key: str) -> Tensor | None:
        if self.folder is None or not (path := self._path(key)).is_file():
            return None
        return load_tensors(path)["latents"]

    def compute(self, key: str, image: Image.Image) -> Tensor:
        """Encodes one picture by itself: in a batch its last digits would depend on its neighbours."""
        like = next(self.vae.parameters())
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(like.device, like.dtype) / 255
        latents = self.vae.encode(pixels)[0].to("cpu", KEPT)
        if self.folder is not None:
            save_checkpoint(self._path(key), {"latents": latents}, {"size": list(image.size)})
        return latents

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def vae_digest(vae: nn.Module) -> str:
    """Of the weights, so that another VAE never finds these latents."""
    digest = hashlib.sha256(repr(vae.spec).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
