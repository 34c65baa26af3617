"""Downloads of MobileCLIP repositories, from a local Hub server."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest
from hub_server import REPOSITORY, HubServer

ROOT = Path(__file__).parents[2]
OTHERS = ("config.json", "open_clip_config.json", "LICENSE", "merges.txt", "run.py", "README.md")


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[HubServer]:
    path = tmp_path / "repository"
    path.mkdir()
    for name in OTHERS:
        (path / name).write_text(f'{{"name": "{name}"}}')
    server = HubServer(path)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def resolve(
    hub: HubServer, cache: Path, *, offline: bool = False
) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": str(int(offline))}
    code = f"""
from mlx_mobileclip.checkpoints.hub import resolve_file
try:
    found = resolve_file({REPOSITORY!r})
    print(found.revision, *sorted(p.name for p in found.path.iterdir()))
except Exception as error:
    print(type(error).__name__, error)
"""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )


@pytest.mark.parametrize(
    ("weights", "count"),
    [
        (("open_clip_model.safetensors", "open_clip_pytorch_model.bin"), 1),
        (("mobileclip2_s0.pt",), 1),
        (("pytorch_model.bin",), 1),
    ],
)
def test_one_weights_file_is_downloaded_once(
    weights: tuple[str, ...], count: int, repository: HubServer, tmp_path: Path
) -> None:
    for name in weights:
        (repository.directory / name).write_bytes(b"weights")
    expected = sorted([*OTHERS[:4], *weights[:count]])
    found = resolve(repository, tmp_path / "cache").stdout.split()
    assert found[1:] == expected
    assert sorted(set(repository.fetched)) == expected
    assert repository.revisions == {found[0]}
    repository.fetched.clear()
    assert resolve(repository, tmp_path / "cache", offline=True).stdout.split() == found
    assert repository.fetched == []


def test_repository_without_weights_is_refused(repository: HubServer, tmp_path: Path) -> None:
    found = resolve(repository, tmp_path / "cache").stdout
    assert found.startswith("CheckpointError") and "has no weights" in found
    assert found.count("\n") == 1
