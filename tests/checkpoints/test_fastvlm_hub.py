"""Downloads from the Hub, against a local server with its API."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import synthetic
from hub_server import COMMIT, REPOSITORY, HubServer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    path = synthetic.write_layout(tmp_path / "repository", "llava_qwen2", shards=2)
    for name in ("llava_qwen.py", "chat_template.jinja", "LICENSE", "README.md", "a.bin", "b.pt"):
        (path / name).write_text("raise SystemExit('ran')")
    server = HubServer(path)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def generate(hub: HubServer, cache: Path, *options: str, offline: bool = False) -> Any:
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": str(int(offline))}
    command = [sys.executable, "-m", "mlx_fastvlm.generate", "--model", REPOSITORY]
    command += ["--prompt", "q", "--max-tokens", "3", *options]
    return subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=100, check=False
    )


def test_download_then_offline(hub: HubServer, tmp_path: Path) -> None:
    """Only needed files of one commit, which is reported, are downloaded; then none."""
    cache = tmp_path / "cache"
    first = generate(hub, cache)
    assert first.returncode == 0, first.stderr
    assert sorted(set(hub.fetched)) == [
        "LICENSE",
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    assert hub.revisions == {COMMIT}
    assert f"loaded {REPOSITORY} at {COMMIT[:12]}" in first.stderr
    hub.fetched.clear()
    for _ in range(2):
        again = generate(hub, cache, "--quiet", offline=True)
        assert again.returncode == 0 and again.stdout == first.stdout and again.stderr == ""
    assert hub.fetched == []


def test_incomplete_download_is_reported_and_can_be_completed(
    hub: HubServer, tmp_path: Path
) -> None:
    hub.broken = {"model-00002-of-00002.safetensors"}
    incomplete = generate(hub, tmp_path / "cache", "--quiet")
    assert incomplete.returncode == 1 and "Traceback" not in incomplete.stderr
    assert (
        incomplete.stderr.startswith(f"error: {REPOSITORY}: ")
        and incomplete.stderr.count("\n") == 1
    )
    assert "connect and run the command again" in incomplete.stderr
    offline = generate(hub, tmp_path / "cache", "--quiet", offline=True)
    assert offline.returncode == 1
    assert "connect and run the command again" in offline.stderr
    hub.broken = set()
    assert generate(hub, tmp_path / "cache", "--quiet").returncode == 0


def test_unknown_revision_is_refused(hub: HubServer, tmp_path: Path) -> None:
    result = generate(hub, tmp_path / "cache", "--revision", "missing")
    assert result.returncode == 1
    assert result.stderr == f"error: {REPOSITORY}: has no revision 'missing'\n"


def test_conversion_records_the_commit(hub: HubServer, tmp_path: Path) -> None:
    target = tmp_path / "out"
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "convert", "--model", REPOSITORY, "--mlx-path", str(target)]
    result = subprocess.run(
        command, cwd=ROOT, env=env | {"HF_HUB_OFFLINE": "0"}, capture_output=True, check=False
    )
    assert result.returncode == 0, result.stderr
    source = json.loads((target / "config.json").read_text())["source"]
    assert source == {"model": REPOSITORY, "revision": COMMIT, "layout": "llava_qwen2"}
    assert COMMIT in (target / "NOTICE").read_text()
    assert (target / "LICENSE").is_file()


def test_directory_named_like_a_repository_is_not_used(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / REPOSITORY).mkdir(parents=True)
    env = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    code = f"from mlx_fastvlm.loader import find_checkpoint as f; f({REPOSITORY!r})"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert f"or write ./{REPOSITORY} for the directory here" in result.stderr


def test_image_processor_config_is_downloaded(hub: HubServer, tmp_path: Path) -> None:
    """Both the nested form of transformers 5 and the earlier one are downloaded."""
    path = hub.directory
    synthetic.write_layout(path, "fast_vlm")
    for name in path.glob("model-*"):
        name.unlink()
    (path / "model.safetensors.index.json").unlink()
    pixels = synthetic.IMAGE_PROCESSOR
    (path / "processor_config.json").write_text(json.dumps({"image_processor": pixels}))
    (path / "preprocessor_config.json").write_text(json.dumps(pixels | {"do_pad": False}))
    refused = generate(hub, tmp_path / "cache", "--quiet")
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1
    assert "processor_config.json (256 px, pad) contradicts preprocessor_config" in refused.stderr
    (path / "preprocessor_config.json").unlink()
    target = tmp_path / "out"
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache2")}
    command = [sys.executable, "-m", "convert", "--model", REPOSITORY, "--mlx-path", str(target)]
    result = subprocess.run(
        command, cwd=ROOT, env=env | {"HF_HUB_OFFLINE": "0"}, capture_output=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert json.loads((target / "config.json").read_text())["image_size"] == 256
