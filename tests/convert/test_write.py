"""Targets of conversions: unwritable ones are refused before any work."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import synthetic
from PIL import Image

import convert
from convert import pipeline, write
from convert.calibration import calibration_samples
from convert.model_card import model_card
from convert.write import PARTIAL, new_directory
from mlx_mobileclip.errors import CheckpointError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write_layout(tmp_path_factory.mktemp("model") / "sound", "llava_qwen2")


def link(target: Path) -> None:
    (target.parent / "empty").mkdir()
    target.symlink_to("empty")


UNWRITABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a link to a directory": (link, "as it is a link"),
    "a link to nothing": (lambda target: target.symlink_to("nowhere"), "as it is a link"),
    "a file in the way": (
        lambda target: target.parent.rmdir() or target.parent.touch(),
        "not a dir",
    ),
}


@pytest.mark.parametrize("name", UNWRITABLE)
def test_unwritable_target_is_refused_before_the_work(
    name: str, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, reason = UNWRITABLE[name]
    target = tmp_path / "parent" / "out"
    target.parent.mkdir()
    build(target)
    monkeypatch.setattr(pipeline, "find_source", None)  # would raise TypeError
    with pytest.raises(CheckpointError, match=f"cannot be written.*{reason}"):
        convert.convert(sound, target, quiet=True)


def test_mount_point_is_refused(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/proc/self/mountinfo").exists() or not Path("/dev/shm").is_mount():
        pytest.skip("needs a mount point of Linux")
    monkeypatch.setattr(Path, "iterdir", lambda _: iter(()))  # an empty one
    for is_mount in (Path.is_mount, lambda _: False):  # as for a bind mount of the same file system
        monkeypatch.setattr(Path, "is_mount", is_mount)
        with pytest.raises(CheckpointError, match="as it is a mount point; give a new directory"):
            write.check_target(Path("/dev/shm"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into any directory")
def test_unwritable_parent_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        for name in ("out", "deep/out"):
            with pytest.raises(CheckpointError, match="cannot be written"):
                write.check_target(tmp_path / name)
    finally:
        tmp_path.chmod(0o700)


def test_partial_directory_is_private(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        with new_directory(tmp_path / "out") as directory:
            (directory / "x").touch()
            assert directory.parent.stat().st_mode & 0o777 == 0o700
            assert directory.parent.name.endswith(PARTIAL)
        assert (tmp_path / "out").stat().st_mode & 0o777 == 0o775
    finally:
        os.umask(before)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_partial_directories_of_others_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, ours = tmp_path / f".out{PARTIAL}", tmp_path / f".out.{'0' * 16}{PARTIAL}"
    old.mkdir()
    ours.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 54321)
        with new_directory(tmp_path / "out"):
            assert old.is_dir() and ours.is_dir()
    (tmp_path / "out").rmdir()
    with new_directory(tmp_path / "out"):
        assert old.is_dir() and not ours.exists()


@pytest.mark.parametrize("appears", ["file", "link", "directory"])
def test_target_created_meanwhile_is_kept(appears: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError), new_directory(target) as directory:
        (directory / "x").touch()
        if appears == "link":
            target.symlink_to("empty")
        elif appears == "file":
            target.write_text("precious")
        else:
            target.mkdir()
            (target / "precious").touch()
    assert not [*(tmp_path / "empty").iterdir()]
    assert target.is_symlink() or target.is_file() or (target / "precious").exists()


def test_dangling_links_are_ignored(sound: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(sound, tmp_path / "source"))
    for name in (
        "LICENSE",
        "README.md",
        "x.safetensors",
        "preprocessor_config.json",
        "x.mlpackage",
    ):
        (source / name).symlink_to("nowhere")
    (source / "loop").symlink_to("loop")
    convert.convert(source, tmp_path / "out", quiet=True)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.jpg").symlink_to("nowhere")
    Image.new("RGB", (9, 9)).save(tmp_path / "pictures" / "b.jpg")
    assert len(calibration_samples(tmp_path / "pictures")) == 1


NO_HOME = """
import os, pwd, runpy, sys
os.environ.pop("HOME", None), os.environ.pop("XDG_CACHE_HOME", None)
def unknown(*_): raise KeyError("uid not found")
pwd.getpwuid = unknown
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__")
"""
IMAGE = str(ROOT / "examples/scene.png")
COMMANDS = {
    "classify": ["mlx_mobileclip", "classify", "--image", IMAGE, "--labels", "a,b"],
    "embed": ["mlx_mobileclip", "embed", "--images", IMAGE, "--output", "x.npz"],
    "generate": ["mlx_fastvlm.generate", "--image", IMAGE, "--max-tokens", "1"],
    "convert": ["convert", "--mlx-path", "~out"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_missing_home_directory_is_no_error(name: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", NO_HOME, *COMMANDS[name], "--model", "demo", "--quiet"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (result.returncode, result.stderr) == (0, ""), result


@pytest.mark.parametrize("argument", ["~nobody-of-that-name/x", "x" * 5000 + "/y", "a\0b/c"])
def test_model_card_accepts_odd_arguments(argument: str) -> None:
    card = model_card(
        name="x", kind="fastvlm", source="x", base_model=None, quantized={}, dtype="float16",
        quality="", command_line=["--model", argument],
    )  # fmt: skip
    assert argument.replace("\0", "") in card
