"""Names of checkpoints and paths as users type them: found, or corrected by a suggestion."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import synthetic

import mlx_fastvlm
import mlx_mobileclip
from mlx_mobileclip import CheckpointError
from mlx_mobileclip.checkpoints.hub import is_repository
from mlx_mobileclip.cli.options import named_path
from mlx_mobileclip.paths import user_path
from mlx_mobileclip.preprocess.image import find_image

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.fixture(autouse=True)
def isolated_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use an empty working directory and home, and no network."""
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


def refusal(model: str, package: Any = mlx_fastvlm, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        package.load(model, **options)
    return str(caught.value)


def test_path_in_an_existing_directory_is_not_a_repository() -> None:
    Path("checkpoints").mkdir()
    Path("apple").mkdir()
    for package in (mlx_fastvlm, mlx_mobileclip):
        assert "checkpoints/x: no such" in refusal("checkpoints/x", package)
    assert not is_repository("checkpoints/x")
    assert is_repository("apple/FastVLM-0.5B") and is_repository("someone/x")


@pytest.mark.parametrize(
    ("package", "typed", "meant"),
    [
        (mlx_fastvlm, "dmeo", "demo"),
        (mlx_fastvlm, "Demo", "demo"),
        (mlx_fastvlm, "FastVLM-0.5B", "apple/FastVLM-0.5B"),
        (mlx_fastvlm, "fastvlm-7b", "apple/FastVLM-7B"),
        (mlx_fastvlm, "apple/FastVLM-1.5", "apple/FastVLM-1.5B"),
        (mlx_mobileclip, "demmo", "demo"),
        (mlx_mobileclip, "apple/MobilCLIP2-S0", "apple/MobileCLIP2-S0"),
        (mlx_mobileclip, "MobileCLIP2-S4", "apple/MobileCLIP2-S4"),
    ],
)
def test_misspelled_names_get_a_suggestion(package: Any, typed: str, meant: str) -> None:
    assert refusal(typed, package).endswith(f"did you mean {meant}?")


def test_other_names_get_no_suggestion() -> None:
    for name in ("apple/FastVLM-0.5B", "someone/else", "./weights", "photo.jpg"):
        assert "did you mean" not in refusal(name)
    assert "is empty" in refusal("")


def test_home_directories_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells do not expand `--option=~/x`."""
    home, work = tmp_path / "home", tmp_path / "work"
    assert user_path("~/x") == named_path("~/x") == home / "x"
    assert user_path("~") == home
    assert user_path("x/~") == Path("x/~") and user_path("~no_such_user") == Path("~no_such_user")
    assert user_path("./~x") == work / "~x" and user_path("./~/x") == work / "~" / "x"
    assert user_path(user_path("./~/x")) == work / "~" / "x"
    (work / "~").mkdir()
    (work / "~" / "a.png").write_bytes(b"here")
    (home / "b.png").write_bytes(b"home")
    assert find_image("./~/a.png").read_bytes() == b"here"
    assert find_image("~/b.png").read_bytes() == b"home"
    assert "./~x: no such directory" in refusal("./~x")
    shutil.copytree(mlx_fastvlm.loader.DEMO_DIRECTORY, home / "model")
    mlx_fastvlm.load("~/model")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.getuid", lambda: 987654)  # a user without a passwd entry
    assert user_path("~/x") == Path("~/x")


def test_adapters_without_their_model_are_refused() -> None:
    for name in ("adapter_config.json", "adapter_model.bin"):
        directory = Path(name).stem
        Path(directory).mkdir()
        Path(directory, name).write_text("{}")
        for package in (mlx_fastvlm, mlx_mobileclip):
            assert "is a LoRA adapter without its base model" in refusal(f"./{directory}", package)
    mx.save_safetensors("adapter_config/adapter_model.safetensors", {"a.lora_A": mx.ones(2)})
    Path("adapter_config/config.json").write_text("{}")  # as LLaVA's code writes it
    assert "is a LoRA adapter" in refusal("./adapter_config")
    merged = synthetic.write_layout(Path("merged"), "llava_qwen2")
    (merged / "adapter_config.json").write_text("{}")
    mlx_fastvlm.load("./merged")


def test_fastvlm_with_pytorch_weights_only_is_refused() -> None:
    path = synthetic.write_layout(Path("bin"), "llava_qwen2")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    assert "only as pytorch_model.bin, which is not supported here; save them" in refusal("./bin")
    (path / "pytorch_model.bin").unlink()
    assert "has no .safetensors file" in refusal("./bin")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_git_lfs_pointers_of_fastvlm_are_refused(name: str) -> None:
    path = synthetic.write_layout(Path("clone"), "llava_qwen2")
    (path / name).write_bytes(POINTER)
    assert f"clone/{name}: is a Git LFS pointer, not the file itself" in refusal("./clone")


def test_git_lfs_pointers_of_mobileclip_and_images_are_refused() -> None:
    for suffix in (".pt", ".safetensors"):
        Path(f"m{suffix}").write_bytes(POINTER)
        refused = refusal(f"./m{suffix}", mlx_mobileclip, variant="MobileCLIP-S0")
        assert "is a Git LFS pointer" in refused
    Path("a.png").write_bytes(POINTER)
    with pytest.raises(mlx_mobileclip.ImageError, match="a Git LFS pointer; run git lfs pull"):
        mlx_mobileclip.load("demo")[1].pixels("a.png")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_weights_are_refused(value: float) -> None:
    path = synthetic.write_layout(Path("bad"), "llava_qwen2")
    tensors = dict(mx.load(str(path / "model.safetensors")))
    tensors["model.norm.weight"] = mx.full((64,), value)
    (path / "model.safetensors").unlink()
    mx.save_safetensors(str(path / "model.safetensors"), tensors)
    for dtype in ("float32", "float16"):
        refused = refusal("./bad", dtype=dtype)
        assert f"not finite in {dtype}" in refused and "download the checkpoint again" in refused
        narrow = dtype == "float16" and np.isinf(value)
        assert ("try --dtype float32" in refused) == narrow
    config = json.loads((path / "config.json").read_text())
    assert config["hidden_size"] == 64
