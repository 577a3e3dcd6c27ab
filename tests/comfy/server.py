"""Where ComfyUI is, and one running server of it over a folder of its own."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from unifusion_core.evaluation import bench_comfy

if sys.platform == "linux":
    import resource

REPO = Path(__file__).parents[2]
PACK = "UniFusion"
MODEL_FOLDERS = ("checkpoints", "diffusion_models", "loras", "text_encoders", "unifusion", "vae", "vlm")
READY_S = 300
STOP_S = 30
MOST_MEMORY = 12 * 2**30  # of address space


@dataclass(frozen=True)
class Comfy:
    path: Path
    python: Path


def find_comfy() -> Comfy | str:
    """Where `unifusion bench --comfy` finds it too; or why there is none."""
    try:
        return Comfy(*bench_comfy.find())
    except ValueError as error:
        return f"{error}: without it the tests of the node pack do not run"


def make_base(base: Path, pack: Path = REPO) -> Path:
    """A base directory of ComfyUI's with the pack linked into its custom_nodes."""
    for folder in ("input", "output", "temp", "user", *(f"models/{name}" for name in MODEL_FOLDERS)):
        (base / folder).mkdir(parents=True)
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / PACK).symlink_to(pack, target_is_directory=True)
    return base


def arguments(base: Path) -> list[str]:
    """Of a ComfyUI that keeps to the CPU and to its base directory."""
    database = f"sqlite:///{base / 'user' / 'comfyui.db'}"
    return ["--cpu", "--base-directory", str(base), "--database-url", database, "--disable-api-nodes"]


def environment() -> dict[str, str]:
    """One thread, nothing on sys.path but ComfyUI's own, and no way out of the machine."""
    outside = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return kept | outside | {"no_proxy": "127.0.0.1,localhost", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


class Server:
    """A ComfyUI over `base`: `with Server(comfy, make_base(folder)) as server`."""

    def __init__(self, comfy: Comfy, base: Path, *extra: str):
        self.base, self.log, self.port = base, base / "server.log", _free_port()
        self.address = f"127.0.0.1:{self.port}"
        self._command = [str(comfy.python), str(comfy.path / "main.py"), *arguments(base), "--port", str(self.port)]
        self._command += ["--disable-auto-launch", "--preview-method", "latent2rgb", *extra]
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> Server:
        """Returns once it answers, or ends it and says why it does not."""
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                self._command,
                cwd=self.base,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                preexec_fn=_bounds if sys.platform == "linux" else None,
            )
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(STOP_S)

    def restart(self) -> None:
        """After a hang or a crash, so that the next test does not suffer from it."""
        self.__exit__()
        self.__enter__()

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def tail(self, lines: int = 40) -> str:
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return "\n".join(["last lines of the server's log:", *(line[:300] for line in text.splitlines()[-lines:])])

    def memory(self) -> int:
        """Resident bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")) * 1024

    def _wait(self) -> None:
        limit = time.monotonic() + READY_S
        while time.monotonic() < limit:
            if not self.alive:
                raise RuntimeError(f"ComfyUI ended with {self.process.returncode} before it answered; {self.tail()}")
            try:
                with urlopen(f"http://{self.address}/system_stats", timeout=5):
                    return
            except (URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)
        raise TimeoutError(f"ComfyUI did not answer within {READY_S} s; {self.tail()}")


def write_tensors(path: Path, tensors: dict[str, tuple[tuple[int, ...], list[float]]]) -> None:
    """A safetensors file of float32 values, without torch."""
    header, data = {}, b""
    for name, (shape, values) in tensors.items():
        chunk = struct.pack(f"<{len(values)}f", *values)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(chunk)]}
        data += chunk
    head = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + data)


def read_header(path: Path) -> dict:
    with path.open("rb") as file:
        return json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _bounds() -> None:
    """On Linux: the server ends with the thread that started it, and cannot take the machine's memory."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
