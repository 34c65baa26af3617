"""A server on a real socket in a thread, and a simple client for it."""

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fastvlm.generation.answer import Chunk, Stats
from mlx_fastvlm.generation.request import Request
from mlx_fastvlm.server.app import App
from mlx_fastvlm.server.engine import Batch, Engine
from mlx_fastvlm.server.models import Models
from mlx_fastvlm.server.serve import listen, make_server
from mlx_fastvlm.server.settings import Settings

SCENE = Path(__file__).parents[2] / "examples" / "scene.png"
STATS = Stats(0.0, 0.0, 0.0, 0.0, 0.0, 0, 5, 0, 1, 0)


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    data: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.data)

    @property
    def error(self) -> Any:
        assert self.json.keys() == {"error"}, self.data[:200]
        assert self.json["error"].keys() == {"message", "type", "param", "code"}
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """The events of a stream, without the final [DONE]."""
        events = self.data.decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


class LiveServer:
    """Serves until `close`; `new_batch` replaces the model."""

    def __init__(
        self,
        models: Models,
        settings: Settings | None = None,
        new_batch: Callable[[], Batch] | None = None,
    ):
        self._models = models
        self.settings = settings or Settings()
        self._new_batch = new_batch or models.new_batch
        self._started = threading.Event()
        self._connections: list[socket.socket] = []
        self._listener = listen("127.0.0.1", 0)
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        assert self._started.wait(30)

    async def _run(self) -> None:
        self.app = App(self.settings, "demo", "demo", debug=True)
        self._server = make_server(self.app, self.settings)
        serving = asyncio.ensure_future(self._server.serve(sockets=[self._listener]))
        engine = Engine(self._new_batch, asyncio.get_running_loop())
        await engine.ready
        self.app.begin(engine, self._models)
        self._started.set()
        await serving
        engine.stop()
        self.app.close()
        assert engine.join(5)

    def wait_until_idle(self, seconds: float = 5) -> None:
        """Wait until no request is in progress; clients get their responses slightly earlier."""
        end = time.monotonic() + seconds
        while self.app.active:
            assert time.monotonic() < end
            time.sleep(0.01)

    def signal(self) -> None:
        """Act as on SIGTERM."""
        self._server.handle_exit(15, None)

    def connect(self, receive_buffer: int | None = None) -> socket.socket:
        """Open a connection; `close` closes it if the test does not."""
        connection = socket.socket()
        self._connections.append(connection)
        connection.settimeout(10)
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.connect(("127.0.0.1", self.port))
        return connection

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, names, response.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Reply:
        return self.request("GET", path, headers=headers)

    def post(self, path: str, body: Any, **headers: str) -> Reply:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.request("POST", path, data, {"Content-Type": "application/json", **headers})

    def chat(self, content: Any = "Hi", **fields: Any) -> Reply:
        messages = [{"role": "user", "content": content}]
        body = {"model": "demo", "messages": messages, **fields}
        return self.post("/v1/chat/completions", body)

    def metric(self, name: str) -> int:
        for line in self.get("/metrics").data.decode().splitlines():
            if line.startswith(f"mlx_fastvlm_{name} "):
                return int(line.split()[-1])
        return 0

    def wait_for(self, name: str, value: int, seconds: float = 5) -> None:
        """Wait until a metric has a value."""
        end = time.monotonic() + seconds
        while self.metric(name) != value:
            assert time.monotonic() < end, f"{name} is {self.metric(name)}, not {value}"
            time.sleep(0.02)


class SlowBatch:
    """Answers every request with a repeated text, one token per step, without a model."""

    def __init__(self, size: int = 8, step_s: float = 0.02, text: str = "x"):
        self.size, self.step_s, self.text = size, step_s, text
        self.requests: dict[int, Request] = {}
        self.removed: list[int] = []
        self.steps: list[Sequence[int]] = []  # request ids served by each step
        self._counts: dict[int, int] = {}
        self._last = 0

    def add(self, request: Request) -> int:
        self._last += 1
        self.requests[self._last] = request
        self._counts[self._last] = 0
        return self._last

    def remove(self, request_id: int) -> None:
        self.removed.append(request_id)
        del self._counts[request_id]

    def step(self) -> list[tuple[int, Chunk]]:
        time.sleep(self.step_s)
        running = list(self._counts)[: self.size]
        self.steps.append(running)
        return list(self._chunks(running))

    def _chunks(self, running: list[int]) -> Iterator[tuple[int, Chunk]]:
        for number in running:
            self._counts[number] += 1
            is_last = self._counts[number] == (self.requests[number].max_tokens or 256)
            yield number, Chunk(self.text, 7, "length" if is_last else None, STATS)
            if is_last:
                del self._counts[number]

    def __len__(self) -> int:
        return len(self._counts)


class BrokenBatch(SlowBatch):
    """Raises an error at each step."""

    def step(self) -> list[tuple[int, Chunk]]:
        self._counts.clear()
        raise RuntimeError("secret prompt")
