"""A local HTTP server with the Hub's API for one repository."""

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

COMMIT = "a93e998963b969dc970544ac9c67b1f2fba9a7f4"
REPOSITORY = "someone/FastVLM-tiny"


class HubServer(ThreadingHTTPServer):
    """Serves one repository and records the requests."""

    def __init__(self, directory: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.directory = directory
        self.fetched: list[str] = []
        self.revisions: set[str] = set()
        self.broken: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: HubServer

    def log_message(self, *_: Any) -> None:
        pass

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        api = f"/api/models/{REPOSITORY}"
        if path.startswith(api):
            root = self.server.directory
            files = [p for p in root.rglob("*") if p.is_file()]
            names = sorted(p.relative_to(root).as_posix() for p in files)
            if "/tree/" in path:
                entries = [self.entry(name) for name in names]
                return self.send(200, json.dumps(entries).encode())
            if path.rpartition("/")[2] == "missing":
                return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            siblings = [{"rfilename": name} for name in names]
            info = {"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}
            return self.send(200, json.dumps(info).encode())
        prefix = f"/{REPOSITORY}/resolve/"
        if not path.startswith(prefix):
            return self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
        revision, _, name = path[len(prefix) :].partition("/")
        self.server.revisions.add(revision)
        if self.command == "GET":
            self.server.fetched.append(name)
        if name in self.server.broken:
            return self.send(403, b"")
        body = (self.server.directory / name).read_bytes()
        etag = hashlib.sha256(body).hexdigest()
        return self.send(200, body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def entry(self, name: str) -> dict[str, Any]:
        body = (self.server.directory / name).read_bytes()
        oid = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
        return {"type": "file", "oid": oid, "size": len(body), "path": name}
