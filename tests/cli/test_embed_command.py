"""`embed`: output, reports of skipped files, progress, and Ctrl-C."""

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from standin import paint

import mlx_mobileclip
from mlx_mobileclip.__main__ import main
from mlx_mobileclip.embedding.files import find_images

pytestmark = pytest.mark.usefixtures("loaded")


def test_embed_images(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "x.npz"
    assert main(["embed", "--images", str(images), "--output", str(output)]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "embedded 3 of 3 images" in err
    assert "\x1b" not in err
    with np.load(output) as data:
        assert json.loads(data["names"].tobytes()) == find_images(str(images))
        assert data["model"] == "apple/MobileCLIP2-S0"


def test_skipped_images_are_reported(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "broken.jpg").write_bytes(b"\xff\xd8")
    args = ["embed", "--images", f"{images}/r*.png", str(images), "--output", f"{tmp_path}/x.npz"]
    assert main([*args, "--quiet", "--batch-size", "2"]) == 1
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2
    assert err[0].startswith("skipped ") and "broken.jpg" in err[0]
    assert "embedded 4 of 5 images" in err[1] and "skipped the 1" in err[1]
    with np.load(tmp_path / "x.npz") as data:
        assert len(json.loads(data["names"].tobytes())) == 4


def test_unreadable_directories_are_reported(
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (images / "locked").mkdir()
    scandir = os.scandir

    def guarded(path: Any = ".") -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)  # chmod does not restrict root
    args = ["embed", "--images", str(images), str(images), "--output", f"{tmp_path}/x.npz"]
    assert main([*args, "--quiet"]) == 1
    err = capsys.readouterr().err.splitlines()
    assert err[0] == f"skipped {images}/locked: cannot be read (Permission denied)"
    assert len(err) == 2
    assert "embedded 6 of 6 images" in err[1] and "skipped the 1" in err[1]
    for source, on_skip in ((images, None), (images / "locked", lambda *_: None)):
        with pytest.raises(mlx_mobileclip.ModelError, match="locked: cannot be read"):
            find_images(str(source), on_skip)


def test_names_that_do_not_fit_are_reported_before_the_model_is_loaded(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    loaded: list[Any],
) -> None:
    monkeypatch.setattr("mlx_mobileclip.embedding.writers.MAX_NAMES_BYTES", 30)
    (tmp_path / "t.txt").write_text('""""""""\n')  # 8, escaped twice 32
    args = ["embed", "--texts", f"{tmp_path}/t.txt", "--output"]
    assert main([*args, f"{tmp_path}/x.safetensors"]) == 1
    assert "write .npz instead" in capsys.readouterr().err
    assert loaded == []
    assert main([*args, f"{tmp_path}/x.npz"]) == 0


def test_embed_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.txt").write_text("a red bus\na blue one\n")
    args = ["embed", "--texts", f"{tmp_path}/t.txt", "--output", f"{tmp_path}/x.safetensors"]
    assert main(args) == 0
    assert "embedded 2 of 2 texts" in capsys.readouterr().err


def test_progress_bar_on_a_terminal(
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr("mlx_mobileclip.terminal.REDRAW_SECONDS", 0)
    args = ["embed", "--images", str(images), "--output", f"{tmp_path}/x.npz", "--batch-size", "1"]
    assert main(args) == 0
    err = capsys.readouterr().err
    assert "3 of 3 images" in err
    assert "/s, 0:0" in err
    assert "[########" in err


def test_progress_lines_without_a_terminal(
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mlx_mobileclip.terminal.LINE_SECONDS", 0)
    args = ["embed", "--images", str(images), "--output", f"{tmp_path}/x.npz", "--batch-size", "1"]
    assert main(args) == 0
    lines = [line.split(" images")[0] for line in capsys.readouterr().err.splitlines()]
    assert [line for line in lines if line.endswith(" of 3")][:3] == ["1 of 3", "2 of 3", "3 of 3"]


def test_ctrl_c_exits_130_and_can_be_resumed(
    images: Path, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    for i in range(30):
        paint(images / f"{i:02}.png", "red", seed=i)
    output = tmp_path / "x.npz"
    args = ["embed", "--images", str(images), "--output", str(output), "--batch-size", "1"]
    process = start(*args)
    partial = tmp_path / "x.npz.partial"
    while process.poll() is None and not (partial.exists() and partial.stat().st_size > 700):
        pass
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert out == ""
    assert "run the same command again" in err
    assert "interrupted" in err
    assert "Traceback" not in err
    assert not output.exists()
    assert main(args) == 0
    assert not partial.exists()


def test_ignored_files_are_reported(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "elsewhere").symlink_to(images)
    (images / "notes.txt").touch()
    (images / ".DS_Store").touch()
    args = ["embed", "--images", str(images), "--output", f"{tmp_path}/x.npz", "--quiet"]
    assert main(args) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ignored 3: ")
    for reason in ("1 .txt", "1 hidden", "1 linked folders that were searched already"):
        assert reason in line


def test_embed_finds_avif_and_linked_folders(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "red.png").rename(images / "red.jfif")
    (images / "damaged.avif").write_bytes(b"\0\0\0\x18ftypavif")
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "linked").symlink_to(images)
    args = ["embed", "--images", f"{tmp_path}/all", "--output", f"{tmp_path}/x.npz", "--quiet"]
    assert main(args) == 1
    err = capsys.readouterr().err.splitlines()
    assert err[0].startswith("skipped ") and "damaged.avif" in err[0]
    assert "embedded 3 of 4 images" in err[1]


def test_embed_updates_an_output(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["embed", "--images", str(images), "--output", f"{tmp_path}/x.safetensors"]
    assert main([*args, "--model", "org/m"]) == 0
    assert main(args) == 1
    assert "update it with --update" in capsys.readouterr().err
    (images / "red.png").unlink()
    paint(images / "new.png", "blue")
    assert main([*args, "--update"]) == 0
    assert "embedded 3 of 3 images" in (err := capsys.readouterr().err)
    assert "(2 kept, 1 dropped)" in err


def test_texts_must_be_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.txt").write_bytes("red\rcafé\r".encode("latin-1"))
    assert main(["embed", "--texts", f"{tmp_path}/t.txt", "--output", f"{tmp_path}/x.npz"]) == 1
    assert "t.txt: line 2 is not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("remedy", ["", "set LD_PRELOAD"])
def test_slow_blas_is_reported_once(
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    remedy: str,
) -> None:
    monkeypatch.setattr("mlx_mobileclip.cpu.process.slow_blas_remedy", lambda: remedy)
    args = ["classify", "--image", f"{images}/red.png", "--labels", "red"]
    assert main(args) == 0
    assert capsys.readouterr().err.count("note: set LD_PRELOAD") == bool(remedy)
    assert main([*args, "--quiet"]) == 0
    assert capsys.readouterr().err == ""
