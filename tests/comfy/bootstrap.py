"""Runs in ComfyUI's Python: what main.py does before it serves, then `main(pack, *args)` of a script.

python bootstrap.py COMFYUI PACK ARGUMENTS SCRIPT SCRIPT_ARGUMENTS, the last line of stdout being its result as JSON.
"""

import asyncio
import importlib
import json
import runpy
import sys
import time


class Pack:
    """The node pack in a ComfyUI that does not serve.

    Attributes:
        core_modules: names in sys.modules before the pack was loaded.
        import_s: seconds of CPU time that loading it took.
        connections: what it asked of the network meanwhile.
    """

    def __init__(self, path: str):
        import nodes

        self.path, self.core, self._listening = path, nodes, True
        self.core_modules, self.connections = frozenset(sys.modules), []
        sys.addaudithook(self._listen)
        start = time.process_time()
        if not asyncio.run(nodes.load_custom_node(path)):
            raise ImportError(f"ComfyUI could not load {path}")
        self.import_s = time.process_time() - start
        self._listening = False

    def module(self, name: str):
        """A module of the pack, as `nodes.sockets` or `unifusion_core.pipeline`."""
        return importlib.import_module(f"{self.path.replace('.', '_x_')}.{name}")

    def run(self, kind: str, **inputs) -> tuple:
        """What a node of the pack or of core gives; Autogrow and DynamicCombo inputs as the dicts a node receives."""
        import torch

        node = self.core.NODE_CLASS_MAPPINGS[kind]
        with torch.inference_mode():
            if hasattr(node, "PREPARE_CLASS_CLONE"):
                return node.PREPARE_CLASS_CLONE(None).EXECUTE_NORMALIZED(**inputs).args
            return getattr(node(), node.FUNCTION)(**inputs)

    def load_core_extras(self) -> None:
        """The nodes of comfy_extras (SamplerCustomAdvanced, ModelMergeSimple …), which take seconds."""
        asyncio.run(self.core.init_builtin_extra_nodes())

    def _listen(self, event: str, args: tuple) -> None:
        if self._listening and event in ("socket.connect", "socket.getaddrinfo", "urllib.Request"):
            self.connections.append(f"{event} {args}")


def main() -> None:
    comfy, pack, arguments, script, script_arguments = sys.argv[1:]
    sys.path[0] = comfy  # instead of this folder
    sys.argv = ["main.py", *json.loads(arguments)]
    import comfy.options

    comfy.options.enable_args_parsing()
    import execution  # noqa: F401  (before nodes, as in main.py)
    import server

    server.PromptServer(asyncio.new_event_loop())  # nodes may ask for its instance
    result = runpy.run_path(script)["main"](Pack(pack), *json.loads(script_arguments))
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
