"""Host, Origin, API key, and limits on sizes and counts."""

import http.client
import json
import socket
import threading
from collections.abc import Callable

import pytest
from live_server import LiveServer, SlowBatch

from mlx_fastvlm.server.command import main
from mlx_fastvlm.server.settings import KEY_VARIABLE, Settings

Starter = Callable[..., LiveServer]
KEY = "correct-horse"


HOSTS = {
    "localhost": 200,
    "LOCALHOST:8080": 200,
    "127.0.0.1:1": 200,
    "[::1]:8080": 200,
    "192.168.0.7": 200,  # addresses cannot be rebound
    "mac.example:8080": 200,
    "evil.example": 403,
    "localhost.evil.example": 403,
    "127.0.0.1.evil.example": 403,
    "[evil]": 400,
    "evil.example@localhost": 400,
    "": 400,
    "a b": 400,
}


def test_allowed_hosts(start: Starter) -> None:
    server = start(Settings(hosts=frozenset({"mac.example"})), SlowBatch)
    replies = {host: server.get("/v1/models", Host=host) for host in HOSTS}
    assert {host: reply.status for host, reply in replies.items()} == HOSTS
    assert all(reply.error for reply in replies.values() if reply.status != 200)


def test_other_origins_are_refused(server: LiveServer) -> None:
    host = f"localhost:{server.port}"
    assert server.get("/v1/models", Host=host, Origin=f"http://{host}").status == 200
    for origin in ("http://evil.example", "null", "http://localhost:1", f"file://{host}"):
        reply = server.get("/v1/models", Host=host, Origin=origin)
        assert reply.status == 403 and reply.error["type"] == "permission_error"


def test_api_key(start: Starter) -> None:
    server = start(Settings(api_key=KEY), SlowBatch)
    for path in ("/v1/models", "/metrics", "/nothing"):
        for value in (None, "", KEY, f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer k\xe9y"):
            headers = {} if value is None else {"Authorization": value}
            reply = server.get(path, **headers)
            assert reply.status == 401 and reply.error["code"] == "invalid_api_key", value
            assert KEY not in reply.data.decode()
    assert server.get("/v1/models", Authorization=f"bearer {KEY}").status == 200
    assert server.get("/health").json == {"status": "ok"}


@pytest.mark.parametrize("key", ["", "with space", "schlüssel", "tab\t"])
def test_invalid_api_keys(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "demo", "--port", "0", "--api-key", key]) == 1
    assert "API key must be" in capsys.readouterr().err


def test_api_key_is_required_beyond_loopback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert main(["--model", "demo", "--host", "0.0.0.0", "--port", "0"]) == 1
    assert "others can reach 0.0.0.0, so a key is required" in capsys.readouterr().err


def test_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["--model", "demo", "--port", str(port)]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: cannot listen on port {port} of 127.0.0.1 (Address already")


def test_body_size_limit(start: Starter) -> None:
    server = start(Settings(max_body_bytes=100_000), SlowBatch)
    too_large = json.dumps({"model": "x" * 200_000}).encode()
    reply = server.post("/v1/chat/completions", too_large)  # by its Content-Length
    assert reply.status == 413 and reply.headers["connection"] == "close" and reply.error
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request(  # chunked, without Content-Length
        "POST",
        "/v1/chat/completions",
        iter([b"x" * 50_000] * 10),
        {"Content-Type": "application/json"},
        encode_chunked=True,
    )
    response = connection.getresponse()
    assert response.status == 413 and json.loads(response.read())["error"]
    connection.close()
    assert server.chat("Hi", max_tokens=1).status == 200


def test_bodies_read_at_the_same_time_share_a_limit(start: Starter) -> None:
    server = start(Settings(max_body_bytes=100_000), SlowBatch)
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: 90000\r\n\r\n"
    )
    partial = [server.connect() for _ in range(4)]
    for connection in partial:
        connection.sendall(head + b"x" * 89_000)
    for _ in range(50):
        reply = server.post("/v1/chat/completions", json.dumps({"model": "x" * 80_000}).encode())
        if reply.status == 429:
            break
    assert reply.status == 429 and reply.headers["retry-after"] == "1"
    for connection in partial:
        connection.close()
    server.wait_for("answers_running", 0)
    assert server.post("/v1/chat/completions", {"model": "x" * 80_000}).status == 400


def test_image_count_limit(start: Starter, scene: str) -> None:
    server = start(Settings(max_images=2))
    parts = [{"type": "image_url", "image_url": {"url": scene}}] * 3
    assert server.chat(parts[:2], max_tokens=1).status == 200
    reply = server.chat(parts, max_tokens=1)
    assert reply.status == 400 and "more than 2 images" in reply.error["message"]


def test_full_queue(start: Starter) -> None:
    batch = SlowBatch(size=1, step_s=0.01)
    server = start(Settings(max_batch=1, max_queue=2), lambda: batch)
    statuses: list[int] = []
    clients = [
        threading.Thread(target=lambda: statuses.append(server.chat(max_tokens=25).status))
        for _ in range(3)
    ]
    for client in clients:
        client.start()
    server.wait_for("answers_waiting", 2)
    reply = server.chat(max_tokens=1)
    assert reply.status == 429 and int(reply.headers["retry-after"]) > 0
    assert reply.error["type"] == "rate_limit_error"
    assert server.get("/health").status == 200
    for client in clients:
        client.join()
    assert statuses == [200] * 3
    assert server.chat(max_tokens=1).status == 200


def test_requests_while_models_load(start: Starter) -> None:
    server = start(Settings(), SlowBatch)
    server.app._engine = None  # as before `begin`
    assert server.get("/health").status == 503
    assert server.get("/health").json == {"status": "loading"}
    reply = server.chat()
    assert reply.status == 503 and int(reply.headers["retry-after"]) > 0
    assert "still loading" in reply.error["message"]


def test_missing_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "./nothing", "--port", "0", "--quiet"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ./nothing: no such directory")
