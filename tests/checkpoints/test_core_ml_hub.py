"""Downloads of repositories with Core ML packages, from a local Hub server."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest
import synthetic
from core_ml_file import MODEL, WEIGHTS
from core_ml_towers import write_app_export, write_mobileclip
from hub_server import COMMIT, REPOSITORY, HubServer
from synthetic_clip import open_clip_tensors, tiny_config, tiny_shapes, values

ROOT = Path(__file__).parents[2]
PARTS = ("Manifest.json", MODEL, WEIGHTS)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    path = tmp_path / "repository"
    path.mkdir()
    server = HubServer(path)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def run(hub: HubServer, cache: Path, code: str, *, offline: bool = False) -> str:
    """Run code in a subprocess; returns its output or its error."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": str(int(offline))}
    code = f"""
from mlx_mobileclip.errors import ModelError
try:
    {code}
except ModelError as error:
    print(f"{{type(error).__name__}}: {{error}}")
"""
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return process.stdout


ASK = (
    "import mlx_fastvlm; "
    f"print(mlx_fastvlm.generate(*mlx_fastvlm.load({REPOSITORY!r}), 'q', max_tokens=2).text == '')"
)


def package_files(name: str) -> set[str]:
    return {f"{name}/{part}" for part in PARTS}


def test_package_of_an_app_export_is_downloaded(hub: HubServer, tmp_path: Path) -> None:
    path, cache = hub.directory, tmp_path / "cache"
    write_app_export(path)
    for name in ("fastvithd.mlpackage/run.py", "other.mlpackage/Manifest.json", "a/b.json"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("{}")
    first = run(hub, cache, ASK)
    assert first in ("True\n", "False\n")
    expected = {"config.json", "model.safetensors", "tokenizer.json"}
    assert set(hub.fetched) == expected | package_files("fastvithd.mlpackage")
    assert hub.revisions == {COMMIT}
    hub.fetched.clear()
    assert run(hub, cache, ASK, offline=True) == first
    assert run(hub, cache, ASK) == first
    assert hub.fetched == []


def test_unneeded_package_is_not_downloaded(hub: HubServer, tmp_path: Path) -> None:
    path, cache = hub.directory, tmp_path / "cache"
    synthetic.write_layout(path, "app export")
    (path / "fastvithd.mlpackage").mkdir()
    (path / "fastvithd.mlpackage" / "Manifest.json").write_text("{}")
    original = synthetic.write_layout(tmp_path / "original", "llava_qwen2")
    given = f"{REPOSITORY!r}, vision_from={str(original)!r}"
    out = run(hub, cache, f"import mlx_fastvlm; mlx_fastvlm.load({given}); print('ok')")
    assert out == "ok\n"
    assert set(hub.fetched) == {"config.json", "model.safetensors", "tokenizer.json"}
    out = run(hub, cache, ASK, offline=True)
    assert out.startswith("CheckpointError") and out.count("\n") == 1
    assert f"{REPOSITORY}/fastvithd.mlpackage: not in the cache" in out


def test_export_without_a_package_is_refused(hub: HubServer, tmp_path: Path) -> None:
    synthetic.write_layout(hub.directory, "app export")
    out = run(hub, tmp_path / "cache", ASK)
    assert "no image tower and no fastvithd.mlpackage" in out and "--vision-from" in out


def test_incomplete_package_is_refused_until_completed(hub: HubServer, tmp_path: Path) -> None:
    path = hub.directory
    write_app_export(path)
    hub.broken = {f"fastvithd.mlpackage/{WEIGHTS}"}
    out = run(hub, tmp_path / "cache", ASK)
    assert out.startswith(f"CheckpointError: {REPOSITORY}/fastvithd") and out.count("\n") == 1
    assert "connect and run the command again" in out
    hub.broken = set()
    assert run(hub, tmp_path / "cache", ASK) in ("True\n", "False\n")


def load_variant(variant: str | None) -> str:
    """Code that loads a variant from a registry of tiny models and prints its name."""
    return f"""
    import sys; sys.path.insert(0, "tests/support")
    from synthetic_clip import tiny_config
    from mlx_mobileclip.models.variants import VARIANTS
    VARIANTS.update({{name: tiny_config(name) for name in ("MobileCLIP-S2", "MobileCLIP-B-LT")}})
    from mlx_mobileclip import load
    print(load({REPOSITORY!r}, variant={variant!r})[0].config.variant)"""


def test_only_the_chosen_variant_is_downloaded(hub: HubServer, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for variant, stem in (("MobileCLIP-S2", "s2"), ("MobileCLIP-B-LT", "blt")):
        tensors = open_clip_tensors(values(tiny_shapes(variant, "apple", fused=True)))
        write_mobileclip(hub.directory, f"mobileclip_{stem}", tiny_config(variant), tensors)
    (hub.directory / "LICENSE").write_text("terms")
    several = run(hub, cache, load_variant(None))
    assert "has Core ML packages of MobileCLIP-B-LT, MobileCLIP-S2; choose one" in several
    assert several.count("\n") == 1
    assert set(hub.fetched) == {"LICENSE"}
    assert run(hub, cache, load_variant("MobileCLIP-S2")) == "MobileCLIP-S2\n"
    packages = {f"mobileclip_s2_{tower}.mlpackage" for tower in ("image", "text")}
    assert set(hub.fetched) == {"LICENSE"}.union(*map(package_files, packages))
    assert hub.revisions == {COMMIT}
    hub.fetched.clear()
    assert run(hub, cache, load_variant("MobileCLIP-S2"), offline=True) == "MobileCLIP-S2\n"
    missing = run(hub, cache, load_variant("MobileCLIP-B-LT"), offline=True)
    assert missing.startswith("CheckpointError") and missing.count("\n") == 1
    assert hub.fetched == []
