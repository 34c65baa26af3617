"""Clients that are slow, disconnect or send malformed HTTP; graceful shutdown."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from live_server import BrokenBatch, LiveServer, SlowBatch

from mlx_fastvlm.server.settings import Settings

Starter = Callable[..., LiveServer]
ROOT = Path(__file__).parents[2]


def chat_request(**fields: object) -> bytes:
    messages = [{"role": "user", "content": "Hi"}]
    body = json.dumps({"model": "demo", "messages": messages, **fields}).encode()
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    ) + body


def read_all(connection: socket.socket) -> bytes:
    data = b""
    try:
        while block := connection.recv(1 << 16):
            data += block
    except ConnectionResetError:
        pass
    return data


@pytest.mark.parametrize("stream", [True, False])
def test_disconnected_client_frees_its_slot(start: Starter, stream: bool) -> None:
    batch = SlowBatch(size=1)
    server = start(Settings(max_batch=1, max_queue=4), lambda: batch)
    running, queued = server.connect(), server.connect()
    running.sendall(chat_request(stream=stream, max_tokens=2000))
    server.wait_for("answers_running", 1)
    queued.sendall(chat_request(stream=stream, max_tokens=2000))
    server.wait_for("answers_waiting", 1)
    queued.close()
    server.wait_for("answers_waiting", 0)
    running.close()
    server.wait_for("answers_running", 0)
    time.sleep(3 * batch.step_s)
    assert sorted(batch.removed) == [1, 2] and len(batch) == 0
    assert all(2 not in served for served in batch.steps)
    assert len(batch.steps) < 200
    assert server.metric('answers_total{finish_reason="cancelled"}') == 2


def test_slot_is_free_at_the_next_step(start: Starter) -> None:
    """The step after the disconnect was noticed serves the next request."""
    batch = SlowBatch(size=1, step_s=0.3)
    server = start(Settings(max_batch=1, max_queue=4), lambda: batch)
    connection = server.connect()
    connection.sendall(chat_request(stream=True, max_tokens=100))
    connection.recv(100)
    done = len(batch.steps)
    connection.close()
    assert server.chat(max_tokens=1).status == 200
    assert batch.steps[-1] == [2] and len(batch.steps) - done <= 2


def test_disconnect_during_the_body_or_image_decoding(start: Starter, scene: str) -> None:
    server = start()
    image = {"type": "image_url", "image_url": {"url": scene}}
    whole = chat_request(messages=[{"role": "user", "content": [image]}], max_tokens=1)
    for length in (10, 200, 5000, len(whole) - 1, len(whole)):
        connection = server.connect()
        connection.sendall(whole[:length])
        connection.close()
    server.wait_for("answers_running", 0)
    assert server.chat(max_tokens=1).status == 200
    server.wait_until_idle()


def test_slow_heads_and_bodies_time_out(start: Starter) -> None:
    server = start(Settings(header_s=0.3, body_s=0.3), SlowBatch)
    silent, head, body = server.connect(), server.connect(), server.connect()
    head.sendall(b"GET /health HTTP/1.1\r\nHost:")
    body.sendall(chat_request()[:-5])
    stop = threading.Event()

    def drip() -> None:
        while not stop.wait(0.05):
            try:
                head.sendall(b"x")
            except OSError:
                return

    dripping = threading.Thread(target=drip)
    dripping.start()
    started = time.monotonic()
    assert read_all(silent) == read_all(head) == b""
    assert b" 408 " in read_all(body).splitlines()[0]
    assert time.monotonic() - started < 4
    stop.set()
    dripping.join()
    used = server.connect()  # a slow second request on the same connection
    used.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea")
    assert read_all(used).startswith(b"HTTP/1.1 200 ")


def test_client_that_does_not_read_is_disconnected(start: Starter) -> None:
    batch = SlowBatch(step_s=0.0, text="x" * 20_000)
    server = start(Settings(write_s=0.3, max_tokens=1 << 20), lambda: batch)
    connection = server.connect(receive_buffer=4096)
    connection.sendall(chat_request(stream=True, max_tokens=1 << 20))
    server.wait_for("answers_running", 1)
    server.wait_for("answers_running", 0, 15)
    assert batch.removed == [1]


def test_connection_limit(start: Starter) -> None:
    server = start(Settings(max_connections=3), SlowBatch)
    connections = [server.connect() for _ in range(3)]
    assert read_all(server.connect()) == b""
    for connection in connections:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 200 ")
    assert server.get("/health").status == 200


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET / HTTP/1.1\r\n\r\n",  # no Host
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
    ],
)
def test_malformed_http(server: LiveServer, data: bytes) -> None:
    connection = server.connect()
    connection.sendall(data)
    head, _, body = read_all(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and json.loads(body)["error"]


@pytest.mark.parametrize("start_of_head", [b"GET /", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: "])
def test_endless_heads_are_refused(server: LiveServer, start_of_head: bytes) -> None:
    connection = server.connect()
    connection.sendall(start_of_head)
    with pytest.raises(OSError, match=r"reset|pipe"):
        for _ in range(1000):
            connection.sendall(b"a" * 10_000)
    assert server.get("/health").status == 200


def test_malformed_chunked_body(server: LiveServer) -> None:
    connection = server.connect()
    connection.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
        b'\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"mod\r\nZZ\r\n'
    )
    assert read_all(connection).startswith(b"HTTP/1.1 400 ")
    assert server.chat(max_tokens=1).status == 200


def test_failing_step_ends_only_running_answers(
    start: Starter, capfd: pytest.CaptureFixture[str]
) -> None:
    batches = iter([BrokenBatch(), SlowBatch()])
    server = start(Settings(), lambda: next(batches))
    reply = server.chat(max_tokens=1)
    assert reply.status == 500 and reply.error["type"] == "server_error"
    assert "secret" not in reply.data.decode()
    assert server.chat(max_tokens=1).status == 200


def test_running_answers_finish_before_shutdown(start: Starter) -> None:
    batch = SlowBatch()
    server = start(Settings(drain_s=20), lambda: batch)
    idle, running = server.connect(), server.connect()
    running.sendall(chat_request(stream=True, max_tokens=30))
    running.recv(10)
    server.signal()
    idle.sendall(chat_request())
    assert idle.recv(1 << 16).startswith(b"HTTP/1.1 503 ")
    assert server.get("/health").status == 503
    assert b"[DONE]" in read_all(running)
    server.close()


def test_answers_end_with_an_error_after_the_drain_timeout(start: Starter) -> None:
    server = start(Settings(drain_s=0.2), SlowBatch)
    running = server.connect()
    running.sendall(chat_request(stream=True, max_tokens=2000))
    running.recv(10)
    started = time.monotonic()
    server.signal()
    *_, event, end = read_all(running).split(b"\n\n")
    assert b"the server is shutting down" in event and b"[DONE]" not in end
    server.close()
    assert time.monotonic() - started < 5


def post(port: int, path: str, body: object) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", path, json.dumps(body).encode(), headers)
    status = connection.getresponse().status
    connection.close()
    return status


def test_signals_end_the_command() -> None:
    command = [sys.executable, "-m", "mlx_fastvlm.server", "--model", "demo", "--port", "0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) for _ in range(2)]
    for process in processes:
        lines = iter(process.stderr.readline, "")
        line = next(line for line in lines if line.startswith("serving at"))
        port = int(re.findall(r"http://127.0.0.1:(\d+)/v1", line)[0])
        chat = {"model": "demo", "messages": [{"role": "user", "content": "secret"}]}
        assert post(port, "/v1/chat/completions", chat) == 200
        assert post(port, "/v1/chat/completions", chat | {"messages": "secret"}) == 400
        assert post(port, "/v1/embeddings", {"model": "demo", "input": "secret " * 100}) == 200
    ends = {signal.SIGTERM: (0, ""), signal.SIGINT: (130, "interrupted")}
    for process, (number, (status, message)) in zip(processes, ends.items(), strict=True):
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
        # Client input is never printed.
        assert (process.returncode, out, err.strip()) == (status, "", message)
