"""A client of ComfyUI's HTTP and websocket API that waits for one job at a time."""

from __future__ import annotations

import io
import json
import struct
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote, urlencode
from urllib.request import Request, urlopen

import numpy as np
import websocket
from PIL import Image

from .server import Server

HTTP_S = 60
PREVIEWS = (1, 4)  # binary message types: a latent preview without, with metadata
TEXT = 3


@dataclass(frozen=True)
class Event:
    """One message about the job: kind as ComfyUI names it, or `preview` or `text` for the binary ones."""

    kind: str
    node: str | None = None
    data: dict[str, Any] = field(default_factory=dict)


@dataclass
class Result:
    status: str = "running"  # refused (400) | success | error | interrupted
    errors: dict[str, str] = field(default_factory=dict)  # node → message; "" for what is said of the whole prompt
    error_types: dict[str, str] = field(default_factory=dict)
    cached: list[str] = field(default_factory=list)
    executed: list[str] = field(default_factory=list)  # in order; what came from the cache is not among them
    progress: list[tuple[str, int, int]] = field(default_factory=list)  # (node, value, max)
    previews: int = 0
    texts: dict[str, list[str]] = field(default_factory=dict)  # node → what it streamed
    outputs: dict[str, dict] = field(default_factory=dict)  # node → what it showed
    stopped_at: str | None = None  # the node at which an interrupt took hold
    seconds: float = 0.0
    client: Client | None = field(default=None, repr=False)

    def images(self, node: Any) -> list[np.ndarray]:
        """What a PreviewImage or SaveImage box shows, each [H, W, 3] uint8."""
        return [self.client.image(entry) for entry in self.outputs[_name(node)]["images"]]

    def ran(self, node: Any) -> bool:
        return _name(node) in self.executed

    def progress_of(self, node: Any) -> list[int]:
        return [value for name, value, _ in self.progress if name == _name(node)]

    def check(self) -> Result:
        assert self.status == "success" and not self.errors, f"{self.status}: {self.errors}"
        return self


class Client:
    def __init__(self, server: Server):
        self.server = server

    def run(
        self,
        graph: Any,
        *,
        on_event: Callable[[Event], Any] | None = None,
        deadline: float = 180.0,
    ) -> Result:
        """Queues a Graph (or API prompt) and waits for its end, calling `on_event` on the way.

        Raises:
            TimeoutError: it did not end in time; the server was started anew.
            ConnectionError: the server went away (and was started anew), or answered neither 200 nor 400.
        """
        prompt = graph.api() if hasattr(graph, "api") else graph
        start, me = time.monotonic(), uuid.uuid4().hex
        result = Result(client=self)
        socket = self._listen(me)
        try:
            status, answer = self._post("/prompt", {"prompt": prompt, "client_id": me})
            _note_refusals(result, answer)
            if status == 400:
                result.status = "refused"
            else:
                self._follow(socket, answer["prompt_id"], result, on_event, start + deadline)
                result.outputs = self.history(answer["prompt_id"])["outputs"]
        except (TimeoutError, websocket.WebSocketException, ConnectionResetError) as err:
            said = self.server.tail()
            self.server.restart()
            if isinstance(err, (TimeoutError, websocket.WebSocketTimeoutException)):
                raise TimeoutError(f"the job did not end in {deadline} s: {result}; {said}") from None
            raise ConnectionError(f"the server went away: {result}; {said}") from None
        finally:
            socket.close()
        result.seconds = time.monotonic() - start
        return result

    def interrupt(self) -> None:
        self._post("/interrupt", {})

    def free(self, unload_models: bool = True, free_memory: bool = True) -> None:
        """Models off the device and, with `free_memory`, every cached result gone; done when the next job starts."""
        self._post("/free", {"unload_models": unload_models, "free_memory": free_memory})
        time.sleep(0.5)  # the idle worker wakes up for it

    def history(self, prompt_id: str) -> dict:
        return self._get(f"/history/{prompt_id}")[prompt_id]

    def object_info(self, kind: str = "") -> dict:
        return self._get(f"/object_info/{kind}" if kind else "/object_info")

    def bytes(self, path: str) -> bytes:
        """The body of any address of the server."""
        with urlopen(self._url(path), timeout=HTTP_S) as answer:
            return answer.read()

    def text(self, path: str) -> str:
        return self.bytes(path).decode()

    def image(self, entry: dict[str, str]) -> np.ndarray:
        """{"filename", "subfolder", "type"} → [H, W, 3] uint8."""
        with Image.open(io.BytesIO(self.bytes(f"/view?{urlencode(entry)}"))) as picture:
            return np.asarray(picture.convert("RGB"))

    def upload_image(self, pixels: np.ndarray, name: str) -> str:
        """[H, W, 3] uint8 → the name that LoadImage takes."""
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        edge = uuid.uuid4().hex
        head = f'--{edge}\r\nContent-Disposition: form-data; name="image"; filename="{quote(name)}"\r\n'
        body = head.encode() + b"Content-Type: image/png\r\n\r\n" + file.getvalue() + f"\r\n--{edge}--\r\n".encode()
        request = Request(self._url("/upload/image"), body, {"Content-Type": f"multipart/form-data; boundary={edge}"})
        with urlopen(request, timeout=HTTP_S) as answer:
            return json.load(answer)["name"]

    def _listen(self, me: str) -> websocket.WebSocket:
        return websocket.create_connection(f"ws://{self.server.address}/ws?clientId={me}", timeout=HTTP_S)

    def _follow(self, socket, prompt_id: str, result: Result, on_event, limit: float) -> None:
        while True:
            socket.settimeout(max(limit - time.monotonic(), 0.01))
            event = _read_event(socket.recv(), prompt_id)
            if event is None:
                continue
            _note(result, event)
            if event.kind == "executing" and event.node is None:
                return
            if on_event is not None:
                on_event(event)

    def _url(self, path: str) -> str:
        return f"http://{self.server.address}{path}"

    def _get(self, path: str) -> Any:
        return json.loads(self.bytes(path))

    def _post(self, path: str, data: dict) -> tuple[int, dict]:
        request = Request(self._url(path), json.dumps(data).encode(), {"Content-Type": "application/json"})
        try:
            with urlopen(request, timeout=HTTP_S) as answer:
                return answer.status, json.loads(answer.read() or b"{}")
        except HTTPError as err:
            body = err.read()
            if err.code == 400:
                return 400, json.loads(body)
            raise ConnectionError(f"{path} answered {err.code}: {body[:500]!r}; {self.server.tail()}") from err


def _name(node: Any) -> str:
    return getattr(node, "name", node)


def _note_refusals(result: Result, answer: dict) -> None:
    """A job is queued if only some of its outputs are refused."""
    for node, found in answer["node_errors"].items():
        said = [f"{error['message']}: {error['details']}" for error in found["errors"]]
        result.errors[node] = "\n".join(said)
        result.error_types[node] = found["errors"][0]["type"]
    if "error" in answer and not result.errors:
        result.errors[""] = answer["error"]["message"]
        result.error_types[""] = answer["error"]["type"]


def _read_event(message: str | bytes, prompt_id: str) -> Event | None:
    """None for what is not about the job."""
    if isinstance(message, bytes):
        kind, rest = struct.unpack(">I", message[:4])[0], message[4:]
        if kind in PREVIEWS:
            return Event("preview")
        if kind != TEXT:
            return None
        length = struct.unpack(">I", rest[:4])[0]
        return Event("text", rest[4 : 4 + length].decode(), {"text": rest[4 + length :].decode()})
    content = json.loads(message)
    data = content["data"]
    if data.get("prompt_id") != prompt_id:
        return None
    return Event(content["type"], data.get("node", data.get("node_id")), data)


def _note(result: Result, event: Event) -> None:
    match event.kind:
        case "execution_cached":
            result.cached = event.data["nodes"]
        case "executing" if event.node is not None:
            result.executed.append(event.node)
        case "progress":
            result.progress.append((event.node, event.data["value"], event.data["max"]))
        case "preview":
            result.previews += 1
        case "text":
            result.texts.setdefault(event.node, []).append(event.data["text"])
        case "execution_success":
            result.status = "success"
        case "execution_interrupted":
            result.status, result.stopped_at = "interrupted", event.node
        case "execution_error":
            result.status = "error"
            result.errors[event.node] = event.data["exception_message"].strip()
            result.error_types[event.node] = event.data["exception_type"]
