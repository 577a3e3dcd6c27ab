"""The VLM, the fusion head and adapters as models that ComfyUI loads, moves away and frees like its own."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import comfy.model_management as management
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP
from torch import nn

if TYPE_CHECKING:
    from ..unifusion_core.conditioning.adapter import LAPAdapter
    from ..unifusion_core.conditioning.vlm import FrozenVLM
    from ..unifusion_core.fusion import FusionHead


def managed(**modules: nn.Module) -> ModelPatcher:
    """A patcher over modules that were not built from ComfyUI's operations, and so must be loaded whole.

    A holder stands between them, because a patcher sets attributes that transformers' models do not let it set.
    """
    holder = nn.Module()
    for name, module in modules.items():
        holder.add_module(name, module)
    return ModelPatcher(
        holder,
        load_device=management.text_encoder_device(),
        offload_device=management.text_encoder_offload_device(),
    )


@dataclass(frozen=True, eq=False)
class ManagedVLM:
    """What travels on a UNIFUSION_VLM socket.

    adapter_layers: tapped by every node, beside those that it asks for; source: whose weights and patcher these are.
    """

    vlm: FrozenVLM
    patcher: ModelPatcher
    adapter_layers: tuple[int, ...] = ()
    source: ManagedVLM | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.source is not None:
            return  # its patcher is told already
        # A VLM that leaves its device forgets the pictures it has read. The callback holds no VLM: no circle.
        remembered = self.vlm.prefix_cache

        def detached(patcher: ModelPatcher, leaves: bool) -> None:
            if leaves:  # core also detaches what stays, to load it again
                remembered.clear()

        if remembered is not None:
            self.patcher.add_callback(CallbacksMP.ON_DETACH, detached)

    def ready(self) -> FrozenVLM:
        """The VLM on its device; what stood in its way is moved off."""
        management.load_models_gpu([self.patcher], force_full_load=True)
        return self.vlm

    def for_adapter(self, adapter: LAPAdapter) -> ManagedVLM:
        """The same VLM, with the layers that the adapter reads tapped as well.

        Raises:
            ValueError: another VLM than the adapter's.
        """
        from ..unifusion_core.conditioning.adapter import tapping

        layers = tuple(sorted({*self.adapter_layers, *adapter.spec.layers}))
        return replace(self, vlm=tapping(self.vlm, adapter.spec), adapter_layers=layers, source=self)


@dataclass(frozen=True, eq=False)
class ManagedFusion:
    """What travels on a UNIFUSION_FUSION socket."""

    head: FusionHead
    patcher: ModelPatcher = field(repr=False)

    def ready(self) -> FusionHead:
        management.load_models_gpu([self.patcher], force_full_load=True)
        return self.head

    def without(self, drop_layers: tuple[int, ...]) -> ManagedFusion:
        """The same weights with the pooling weight of these layers at zero."""
        return replace(self, head=replace(self.head, drop_layers=drop_layers))

    @property
    def spec(self):
        return self.head.spec

    @property
    def lap(self):
        return self.head.lap

    @property
    def refiner(self):
        return self.head.refiner


@dataclass(frozen=True, eq=False)
class ManagedAdapter:
    """What travels on a UNIFUSION_ADAPTER socket."""

    adapter: LAPAdapter
    patcher: ModelPatcher = field(repr=False)

    def ready(self) -> LAPAdapter:
        management.load_models_gpu([self.patcher], force_full_load=True)
        return self.adapter


# Two loader nodes of one file share one copy, which goes when the last graph lets go of it.
LOADED: WeakValueDictionary = WeakValueDictionary()
