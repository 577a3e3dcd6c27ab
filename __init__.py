"""UniFusion as a ComfyUI node pack. Outside ComfyUI this file does nothing; the core is `unifusion_core`."""

from importlib.util import find_spec

if find_spec("comfy_api") is not None:
    from .nodes import comfy_entrypoint

    WEB_DIRECTORY = "./js"
    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
