"""Pictures that the VLM has read: keys, values and tapped states of a prompt's beginning, kept for the next prompt.

The tokens up to the end of the last picture do not depend on what follows them: attention is causal, and where a family
lets the tokens of a picture see each other (Gemma 3), the whole picture lies inside. The prefix is always read by a
forward of its own, remembered or not, so what follows a remembered one is the same arithmetic as after a new one.
"""

from __future__ import annotations

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# These layers never write into the keys and values they hold: an update makes new tensors.
SHAREABLE = (DynamicLayer, DynamicSlidingWindowLayer)
# Inputs of a model's forward that have one entry per token, along the last axis.
PER_TOKEN = ("position_ids", "token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True, eq=False)
class Prefix:
    """What is kept of the first `length` tokens of one row.

    Args:
        cache: their keys and values, as a cache that `fresh_cache` copies and nobody extends.
        states: [1, length, L, E], the tapped residual streams.
    """

    length: int
    cache: DynamicCache
    states: Tensor

    @property
    def nbytes(self) -> int:
        held = [tensor for layer in self.cache.layers for tensor in (layer.keys, layer.values)]
        return sum(tensor.untyped_storage().nbytes() for tensor in [self.states, *held])

    @classmethod
    def of(cls, cache: DynamicCache, states: Tensor) -> Prefix:
        """Takes over a cache that has just read the tokens of these states."""
        for layer in cache.layers:  # a sliding window is a view of everything that passed through it
            layer.keys, layer.values = _compact(layer.keys), _compact(layer.values)
        return cls(states.shape[1], cache, states)

    def fresh_cache(self) -> DynamicCache:
        """Returns a cache that goes on from here; it shares the tensors and leaves this one as it is."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        return cache


class PrefixCache:
    """Remembers the prefixes used last, up to a number of them and of bytes, on the VLM's device.

    Args:
        entries: most prefixes. `max_bytes`: of keys, values and states together; a larger prefix is not kept at all.
    Raises:
        ValueError: a negative limit.
    """

    def __init__(self, entries: int = 1, max_bytes: int = 2**30) -> None:
        if entries < 0 or max_bytes < 0:
            raise ValueError(f"entries {entries}, max_bytes {max_bytes}: expected 0 or more")
        self.entries, self.max_bytes = entries, max_bytes
        self._kept: OrderedDict[Hashable, Prefix] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        return sum(prefix.nbytes for prefix in self._kept.values())

    def get(self, key: Hashable) -> Prefix | None:
        """Returns the prefix of this key, which thereby becomes the newest, or None."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: Hashable, prefix: Prefix) -> None:
        """Keeps a prefix, if it is not too large, and forgets the oldest others until the limits hold."""
        if prefix.nbytes > self.max_bytes:
            return
        self._kept[key] = prefix
        self._kept.move_to_end(key)
        while len(self) > self.entries or self.nbytes > self.max_bytes:
            self._kept.popitem(last=False)

    def make_room(self) -> None:
        """Forgets the oldest prefix where one more would be too many, so that both are never held at once."""
        while self._kept and len(self) >= self.entries:
            self._kept.popitem(last=False)

    def clear(self) -> None:
        self._kept.clear()


def new_cache(config: PretrainedConfig) -> DynamicCache | None:
    """Returns an empty cache for a text model, None where its layers keep something that cannot be shared."""
    cache = DynamicCache(config=config)
    return cache if all(type(layer) in SHAREABLE for layer in cache.layers) else None


def pictures_digest(inputs: Mapping[str, Tensor]) -> str:
    """Returns a SHA-256 over the names, types, shapes and bytes of all inputs that are not one per token."""
    digest = hashlib.sha256()
    for name in sorted(inputs.keys() - set(PER_TOKEN)):
        tensor = inputs[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def cut(inputs: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    """Returns the inputs that are one per token, for the tokens `start:stop`."""
    return {name: inputs[name][..., start:stop] for name in PER_TOKEN if inputs.get(name) is not None}


def _compact(tensor: Tensor) -> Tensor:
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
