"""`convert --upload-repo`, against a local Hub server."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from mlx_fastvlm import load

ROOT = Path(__file__).parents[2]
NAME = "me/demo"


class UploadServer(ThreadingHTTPServer):
    """Accepts commits to any repository, or refuses all requests with `status`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.status = 200
        self.files: dict[str, bytes] = {}
        self.created: list[dict[str, Any]] = []


class Handler(BaseHTTPRequestHandler):
    server: UploadServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer: dict[str, Any] = {"error": "no"}
        if self.server.status == 200:
            answer = self.answer(body)
        data = json.dumps(answer).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def answer(self, body: bytes) -> dict[str, Any]:
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            return {"url": f"{self.server.url}/{NAME}", "name": NAME}
        if "/preupload/" in self.path:
            kind = {"uploadMode": "regular", "shouldIgnore": False}
            return {"files": [{"path": f["path"], **kind} for f in json.loads(body)["files"]]}
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.files[line["value"]["path"]] = content
            return {"commitUrl": f"{self.server.url}/{NAME}/commit/1", "commitOid": "1"}
        return {"errors": [], "warnings": []}  # validation of README.md's header

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[UploadServer]:
    server = UploadServer()
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def convert(
    hub: UploadServer, tmp_path: Path, name: str = NAME, token: str = "hf_x"
) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    env |= {"HF_TOKEN": token, "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT)}
    env.pop("HF_HUB_OFFLINE", None)
    options = ["--model", "demo", "--mlx-path", str(tmp_path / "out"), "--upload-repo", name]
    return subprocess.run(
        [sys.executable, "-m", "convert", *options],
        env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_uploaded_files_equal_written_ones(hub: UploadServer, tmp_path: Path) -> None:
    result = convert(hub, tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"{hub.url}/{NAME}/commit/1" in result.stderr
    (created,) = hub.created
    assert (created["organization"], created["name"]) == tuple(NAME.split("/"))
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert hub.files == written
    card = hub.files["README.md"].decode()
    assert "research purposes only" in card
    assert f"python -m convert --model demo --mlx-path out --upload-repo {NAME}\n" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize(("status", "why"), [(403, "your token may not write"), (500, "not up")])
def test_failed_upload_keeps_the_conversion(
    status: int, why: str, hub: UploadServer, tmp_path: Path
) -> None:
    """The error says how to push the finished conversion."""
    hub.status = status
    result = convert(hub, tmp_path)
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    out = tmp_path / "out"
    assert why in line and f"{out} is complete, push it with: hf upload {NAME} {out}" in line
    load(out)


def test_missing_token_or_bad_name_is_refused_before_the_work(
    hub: UploadServer, tmp_path: Path
) -> None:
    for name, token, why in ((NAME, "", "run: hf auth login"), ("model", "hf_x", "like you/model")):
        result = convert(hub, tmp_path, name, token)
        assert (result.returncode, why in result.stderr) == (1, True), result.stderr
        assert not (tmp_path / "out").exists()
    assert not hub.created
