"""Speed of the node pack in a real ComfyUI, as ratios: it is started in processes of its own, never imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACK = Path(__file__).parents[2]
STEPS = 20
START_S = 600  # the most that a start may take


def find() -> tuple[Path, Path]:
    """ComfyUI's folder and its Python: $COMFYUI_PATH and $COMFYUI_PYTHON, else comfy-cli's default workspace.

    Raises:
        ValueError: there is none.
    """
    path = Path(os.environ.get("COMFYUI_PATH") or Path.home() / "comfy" / "ComfyUI").expanduser()
    if not (path / "main.py").is_file():
        raise ValueError(f"no ComfyUI at {path}; set COMFYUI_PATH, and COMFYUI_PYTHON to the Python that runs it")
    inside = [path / venv / sub for venv in (".venv", "venv") for sub in ("bin/python", "Scripts/python.exe")]
    found = next((python for python in inside if python.is_file()), Path(sys.executable))
    python = Path(os.environ.get("COMFYUI_PYTHON") or found).expanduser()
    if not python.is_file():
        raise ValueError(f"no Python at {python}; set COMFYUI_PYTHON to the one that runs ComfyUI")
    return path, python


def run(*, repeats: int = 5, progress: Callable[[str, int, int], None] | None = None) -> dict[str, Any]:
    """Measures KSampler over the forwards it makes, and a start with the pack over one without; as `bench.run`."""
    if not (PACK / "nodes" / "bench.py").is_file():
        raise ValueError(f"{PACK} holds no node pack; run it from a checkout of the repository")
    comfy, python = find()
    if progress:
        progress("ksampler_overhead", 0, 2)
    overhead = _ksampler(comfy, python, repeats)
    if progress:
        progress("start", 1, 2)
    rows = {
        "ksampler_overhead": (overhead, f"a {STEPS}-step KSampler run over the DiT's bare forwards in it"),
        "start": (_start_ratio(comfy, python, repeats), "a start of the server with the pack over one without"),
    }
    measures = {
        name: {"value": value, "target": "<= 1.1", "met": value <= 1.1, "what": what}
        for name, (value, what) in rows.items()
    }
    return {"model": "micro", "threads": 1, "repeats": repeats, "comfyui": str(comfy), "measures": measures}


def _ksampler(comfy: Path, python: Path, repeats: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        # Not by its path: that would put nodes/ first on sys.path, where inspect.py hides the standard library's.
        call = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
        command = [str(python), "-c", call, str(PACK / "nodes" / "bench.py")]
        command += [str(comfy), str(PACK), str(STEPS), str(repeats)]
        done = subprocess.run(command, cwd=folder, env=_environment(), capture_output=True, text=True, timeout=START_S)
    if done.returncode:
        raise ValueError(f"ComfyUI's Python failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])["ksampler_overhead"]


def _start_ratio(comfy: Path, python: Path, repeats: int) -> float:
    """The least of both, in turn; in CPU seconds of the server's process."""
    with tempfile.TemporaryDirectory() as folder:
        bases = {}
        for name in ("with", "without"):
            bases[name] = Path(folder) / name
            (bases[name] / "custom_nodes").mkdir(parents=True)
        (bases["with"] / "custom_nodes" / "UniFusion").symlink_to(PACK, target_is_directory=True)
        times: dict[str, list[float]] = {name: [] for name in bases}
        for _ in range(repeats):
            for name, base in bases.items():
                times[name].append(_start(comfy, python, base))
    return min(times["with"]) / min(times["without"])


def _start(comfy: Path, python: Path, base: Path) -> float:
    database = f"sqlite:///{base / 'comfyui.db'}"
    command = [str(python), str(comfy / "main.py"), "--cpu", "--base-directory", str(base)]
    command += ["--database-url", database, "--disable-api-nodes", "--quick-test-for-ci"]
    before = _children_s()
    done = subprocess.run(command, cwd=base, env=_environment(), capture_output=True, text=True, timeout=START_S)
    if done.returncode:
        raise ValueError(f"ComfyUI did not start: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return _children_s() - before


def _children_s() -> float:
    if os.name == "nt":  # which does not count them
        return time.monotonic()
    times = os.times()
    return times.children_user + times.children_system


def _environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
