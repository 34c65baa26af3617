"""The command line of mlx_mobileclip: usage, errors, warnings and a closed pipe."""

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from standin import StandIn, StandInProcessor

import mlx_mobileclip
from mlx_mobileclip.__main__ import main
from mlx_mobileclip.cpu import process
from mlx_mobileclip.models.clip import PreprocessConfig
from mlx_mobileclip.terminal import printable

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("loaded")


def test_errors_are_one_line_and_reported_before_the_model_is_loaded(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], loaded: list[Any]
) -> None:
    red = f"{images}/red.png"
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "there.npz").write_text("")
    for args, match in (
        (["classify", "--image", "none.png", "--labels", "a"], "no such file"),
        (["classify", "--image", red, "--labels", " , "], "no labels"),
        (["classify", "--image", red, "--labels-file", "none.txt"], "cannot be read"),
        (["classify", "--image", red, "--labels-file", f"{tmp_path}/empty.txt"], "no labels"),
        (["classify", "--image", red, "--labels", "a", "--top-k", "0"], "at least 1"),
        (["embed", "--images", "none", "--output", f"{tmp_path}/x.npz"], "no such file"),
        (["embed", "--images", red, "--output", f"{tmp_path}/x.csv"], "must end in"),
        (["embed", "--images", red, "--output", f"{tmp_path}/there.npz"], "already exists"),
        (["embed", "--texts", "none.txt", "--output", f"{tmp_path}/x.npz"], "cannot be read"),
        (["evaluate", "--imagenet", str(images)], "contains no directories"),
        (["embed", "--images", "~nobodyx", "--output", f"{tmp_path}/x.npz"], "no such file"),
        (["evaluate", "--captions", "none.json"], "needs --images"),
        (
            ["evaluate", "--captions", "x", "--images", "x", "--template", "{}"],
            "does not use --template",
        ),
        (["evaluate", "--captions", "x", "--images", "x", "--templates", "openai"], "--templates"),
        (["evaluate", "--imagenet", "x", "--images", "x"], "does not use --images"),
        (
            ["evaluate", "--captions", "x", "--images", "x", "--classes-from-folders"],
            "does not use",
        ),
        (["embed", "--images", "", "--output", f"{tmp_path}/x.npz"], "the name is empty"),
        (["evaluate", "--captions", "none.json", "--images", "x"], "cannot be read"),
    ):
        assert main(args) == 1, args
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ") and err.count("\n") == 1, err
        assert match in err
    assert loaded == []


PREPROCESS = '{"image_size": 64, "interpolation": "bicubic", "mean": [0, 0, 0], "std": [1, 1, 1]}'


def test_preprocess_option(
    images: Path, capsys: pytest.CaptureFixture[str], loaded: list[Any]
) -> None:
    args = ["classify", "--image", f"{images}/red.png", "--labels", "a", "--config", "c.json"]
    assert main([*args, "--preprocess", PREPROCESS]) == 0
    stated = PreprocessConfig(64, "bicubic", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert loaded[0][1]["preprocess"] == stated and loaded[0][1]["config"] == "c.json"
    for given, match in (
        ("{", "argument --preprocess: Expecting property name"),
        ("[" * 10000, "argument --preprocess: is nested too deeply"),
        ("", "argument --preprocess: Expecting value"),
        ("3", "give a JSON object of image_size, interpolation, mean, std"),
        (PREPROCESS.replace("mean", "means"), "give a JSON object of"),
        (PREPROCESS.replace("64", "5"), "preprocess: image_size: 5 is not"),
        (PREPROCESS.replace("bicubic", "nearest"), "'nearest' is not one of"),
        (PREPROCESS.replace("[1, 1, 1]", "[1, 1]"), "std: has 2 entries"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit, match="2"):
            main([*args, "--preprocess", given])
        assert match in capsys.readouterr().err.splitlines()[-1]
    assert len(loaded) == 1


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["paint"],
        ["classify", "--labels", "a"],
        ["classify", "--image", "x.png"],
        ["classify", "--image", "x.png", "--labels", "a", "--imagenet"],
        ["classify", "--image", "x", "--labels", "a", "--template", "{}", "--templates", "simple"],
        ["embed", "--images", "x"],
        ["embed", "--images", "x", "--texts", "y", "--output", "z.npz"],
        ["embed", "--images", "x", "--output", "z.npz", "--batch-size", "many"],
        ["evaluate"],
        ["evaluate", "--imagenet", ""],
        ["evaluate", "--captions", "x.json", "--images", ""],
    ],
)
def test_usage_errors_exit_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(args)
    assert ended.value.code == 2
    assert capsys.readouterr().out == ""


def test_debug_shows_the_traceback(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classify", "--image", "none.png", "--labels", "a", "--debug"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback ") and "DataError: none.png: no such file" in err


def test_closed_pipe_is_quiet(images: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    args = ["--image", f"{images}/red.png", "--labels", "red,green,blue", "--quiet"]
    process = start("classify", *args)
    assert process.stdout and process.stderr
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=30) == 130
    assert err == ""


def test_warnings_are_one_line(
    images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Long(StandInProcessor):
        def texts(self, texts: list[str]) -> mx.array:
            warnings.warn("a text is\x1b[2J cut", stacklevel=2)
            return super().texts(texts)

    monkeypatch.setattr(mlx_mobileclip, "load", lambda *_, **__: (StandIn(), Long()))
    args = ["classify", "--image", f"{images}/red.png", "--labels", "red", "--quiet"]
    assert main(args) == 0
    assert set(capsys.readouterr().err.splitlines()) == {"warning: a text is[2J cut"}


def test_printable_removes_control_characters() -> None:
    text = "a\x1b[2Jb\n\tc\x7f\x9b\udcff"
    assert printable(text) == "a[2Jbc\\udcff"
    assert printable(text, keep="\n\t") == "a[2Jb\n\tc\\udcff"


def test_help_loads_no_heavy_package() -> None:
    code = """
import sys
from mlx_mobileclip.__main__ import build_parser
build_parser().format_help()
print({"mlx", "numpy", "PIL", "safetensors", "huggingface_hub"} & set(sys.modules))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "set()\n", result.stderr


def test_slow_blas_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = {
        "/v/mlx_cpu.libs/libblas-bd8a282c.so.3.10.0": True,
        "/usr/lib/x86_64-linux-gnu/blas/libblas.so.3.10.0": True,
        "/usr/lib/x86_64-linux-gnu/openblas-pthread/libblas.so.3": False,
        "/v/numpy.libs/libscipy_openblas64_-32a4b2a6.so": False,
    }
    monkeypatch.setattr(process, "on_cpu", lambda: True)
    monkeypatch.setattr(process.sys, "platform", "linux")
    monkeypatch.setattr(process.ctypes, "CDLL", lambda _: SimpleNamespace())
    for line, slow in maps.items():
        text = f"7f00 r-xp 0 {line}\n7f01 r-xp 0 /usr/lib/libc.so.6\n"
        monkeypatch.setattr(Path, "read_text", lambda *_, text=text, **__: text)
        assert ("LD_PRELOAD" in process.slow_blas_remedy()) == slow, line
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"7f {next(iter(maps))}\n")
    fast = SimpleNamespace(openblas_set_num_threads=None)
    for target, value in (("ctypes.CDLL", lambda _: fast), ("on_cpu", lambda: False)):
        with monkeypatch.context() as patch:
            patch.setattr(f"mlx_mobileclip.cpu.process.{target}", value)
            assert process.slow_blas_remedy() == ""
    monkeypatch.setattr(process.sys, "platform", "darwin")
    assert process.slow_blas_remedy() == ""
