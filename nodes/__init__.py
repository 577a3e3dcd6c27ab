"""The nodes, in flow order. Nothing heavy is imported before a node runs."""

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from . import condition, encode, encode_for, inspect, loaders, sample, scene, schedule


class UniFusionExtension(ComfyExtension):
    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        parts = (loaders, encode, encode_for, condition, schedule, sample, inspect, scene)
        return [node for part in parts for node in part.NODES]


async def comfy_entrypoint() -> UniFusionExtension:
    return UniFusionExtension()
