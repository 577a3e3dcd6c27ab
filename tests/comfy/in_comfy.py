"""Runs a check inside ComfyUI's Python, with the pack loaded as ComfyUI loads it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from .server import PACK, Comfy, arguments, environment

BOOTSTRAP = Path(__file__).with_name("bootstrap.py")
LIMIT_S = 600


def run_in_comfy(comfy: Comfy, base: Path, script: Path, *args: object, limit: float = LIMIT_S) -> dict:
    """What `main(pack, *args)` of the script returns, over JSON; `pack` is bootstrap.Pack.

    Raises:
        RuntimeError: the script failed; its output is in the message.
    """
    pack = base / "custom_nodes" / PACK
    command = [str(comfy.python), str(BOOTSTRAP), str(comfy.path), str(pack), json.dumps(arguments(base)), str(script)]
    done = subprocess.run(
        [*command, json.dumps(args)],
        cwd=base,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=limit,
    )
    if done.returncode:
        raise RuntimeError(f"{script.name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
