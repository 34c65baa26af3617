"""The model name `demo` in both packages, with stand-ins for the real models."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import synthetic
import synthetic_clip
from PIL import Image
from synthetic_clip import tiny_config, tiny_shapes, values

import mlx_fastvlm
import mlx_mobileclip
from convert import __main__ as converter
from mlx_fastvlm import loader as fastvlm
from mlx_fastvlm.cli import generate as cli
from mlx_mobileclip import __main__ as clip_command
from mlx_mobileclip.checkpoints import hub, mobileclip
from mlx_mobileclip.checkpoints.weights import named_parameters
from mlx_mobileclip.errors import CheckpointError, ModelError
from mlx_mobileclip.models.variants import VARIANTS

FIND: dict[str, Callable[..., hub.Checkpoint]] = {
    "mlx_fastvlm": fastvlm.find_checkpoint,
    "mlx_mobileclip": hub.resolve_file,
}


@pytest.fixture(scope="module")
def standins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A converted checkpoint for each package."""
    folder = tmp_path_factory.mktemp("demo")
    vlm = synthetic.write_layout(folder / "vlm", "llava_qwen2")
    clip = folder / "mobileclip2_s0.pt"
    synthetic_clip.write(clip, values(tiny_shapes("MobileCLIP2-S0", "open_clip")))
    made = {"mlx_fastvlm": folder / "mlx_fastvlm", "mlx_mobileclip": folder / "mlx_mobileclip"}
    with pytest.MonkeyPatch.context() as patch:
        small = {name: tiny_config(name) for name in VARIANTS}
        patch.setattr(mobileclip, "VARIANTS", small)
        for source, target in zip((vlm, clip), made.values(), strict=True):
            options = ["--model", str(source), "--mlx-path", str(target), "--dtype", "float32"]
            assert converter.main([*options, "--quiet"]) == 0
    return made


@pytest.fixture(autouse=True)
def installed(
    standins: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> dict[str, Path]:
    """Install the stand-ins as the packaged models, and work in an empty directory."""
    monkeypatch.setattr(fastvlm, "DEMO_DIRECTORY", standins["mlx_fastvlm"])
    monkeypatch.setattr(hub, "DEMO_DIRECTORY", standins["mlx_mobileclip"])
    monkeypatch.setenv("MLX_MOBILECLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return standins


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "a.png"
    Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(path)
    return str(path)


def test_demo_directories_are_in_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert Path(mlx_fastvlm.__file__).parent / "demo" == fastvlm.DEMO_DIRECTORY
    assert Path(mlx_mobileclip.__file__).parent / "demo" == hub.DEMO_DIRECTORY


def test_load(installed: dict[str, Path]) -> None:
    for package in (mlx_fastvlm, mlx_mobileclip):
        named = named_parameters(package.load("demo")[0])
        given = named_parameters(package.load(installed[package.__name__])[0])
        assert named.keys() == given.keys()
        assert all(mx.array_equal(named[name], given[name]).item() for name in given)


def test_generate(image: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "demo", "--image", image, "--resolution", "128", "--max-tokens", "3"]
    assert cli.main(options) == 0
    out, err = capsys.readouterr()
    assert out and "loaded demo (" in err and "(4 image)" in err


def test_classify_and_embed(image: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["classify", "--model", "demo", "--image", image, "--labels", "a"]
    assert clip_command.main(options) == 0
    assert capsys.readouterr().out.startswith("100.0 %")
    options = ["embed", "--model", "demo", "--images", image, "--output", "x.npz"]
    assert clip_command.main(options) == 0
    assert Path("x.npz").is_file()


@pytest.mark.parametrize("quantize", [(), ("-q", "--q-bits", "8", "--q-group-size", "32")], ids=len)
def test_convert_finds_the_fastvlm(quantize: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()  # looks like a MobileCLIP without a config
    options = ["--model", "demo", "--mlx-path", "out", "--dtype", "float32", "--verify"]
    assert converter.main([*options, *quantize]) == 0
    model, _ = mlx_fastvlm.load(tmp_path / "out")
    assert bool(model.config.quantization) == bool(quantize)


@pytest.mark.parametrize("package", FIND)
def test_directory_named_demo_needs_a_dot(
    package: str, installed: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "demo").mkdir()
    find = FIND[package]
    assert find("demo") == hub.Checkpoint(installed[package], "demo")
    assert find("./demo").path == find(Path("demo")).path == Path("demo")


@pytest.mark.parametrize("package", FIND)
def test_demo_has_no_revisions(package: str) -> None:
    with pytest.raises(CheckpointError, match="has no revisions; leave out --revision"):
        FIND[package]("demo", "main")


@pytest.mark.parametrize("package", FIND)
def test_damaged_demo_is_refused(
    package: str, installed: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = fastvlm if package == "mlx_fastvlm" else hub
    load: Any = {"mlx_fastvlm": mlx_fastvlm, "mlx_mobileclip": mlx_mobileclip}[package].load
    broken = tmp_path / "broken"
    monkeypatch.setattr(place, "DEMO_DIRECTORY", broken)
    with pytest.raises(
        CheckpointError, match=r"^demo: is not part of this installation \(.*broken is missing\)$"
    ):
        load("demo")
    shutil.copytree(installed[package], broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="not a valid safetensors file"):
        load("demo")


@pytest.mark.parametrize("package", FIND)
def test_failed_download_suggests_the_demo(
    package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*_: Any, **__: Any) -> None:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=r"run the command again .*; or try --model demo, a small"):
        FIND[package]("org/name")
    monkeypatch.setattr(fastvlm, "DEMO_DIRECTORY", tmp_path / "none")
    monkeypatch.setattr(hub, "DEMO_DIRECTORY", tmp_path / "none")
    with pytest.raises(ModelError, match=r"run the command again to download it$"):
        FIND[package]("org/name")
