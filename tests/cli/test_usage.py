"""Usage errors suggest the right spelling, and every help ends with examples that work."""

import io
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from convert.__main__ import build_parser as convert_parser
from convert.__main__ import main as convert_main
from mlx_fastvlm.__main__ import main as fastvlm_main
from mlx_fastvlm.check import command as check
from mlx_fastvlm.cli import generate
from mlx_mobileclip.__main__ import build_parser as clip_parser
from mlx_mobileclip.__main__ import main as clip_main

ROOT = Path(__file__).parents[2]
IMAGE = ["--image", "a.png"]


def usage_error(
    parse: Callable[[list[str]], object], argv: list[str], capsys: pytest.CaptureFixture[str]
) -> str:
    with pytest.raises(SystemExit) as ended:
        parse(argv)
    assert ended.value.code == 2
    *_, line = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["--promt", "Hi"], "--prompt"),
        (["--imgae=a.png"], "--image"),
        ([*IMAGE, "--max-token", "3", "--sed", "1"], "--seed"),
        ([*IMAGE, "--image-mode", "crp"], "crop"),
    ],
)
def test_generate_suggests_spellings(
    argv: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parse = generate.build_parser("generate").parse_args
    assert usage_error(parse, argv, capsys).endswith(f"; did you mean {meant}?")


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["clasify"], "classify"),
        (["classify", *IMAGE, "--lables", "a,b"], "--labels"),
        (["embed", "--images", ".", "--output", "x.npz", "--updat3"], "--update"),
        (["embed", "--images", ".", "--output", "x.npz", "--dtype", "flaot16"], "float16"),
    ],
)
def test_mobileclip_suggests_spellings(
    argv: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"; did you mean {meant}?" in usage_error(clip_parser().parse_args, argv, capsys)


def test_convert_suggests_spellings(capsys: pytest.CaptureFixture[str]) -> None:
    """A misspelled required option gets a suggestion, too."""
    line = usage_error(convert_parser().parse_args, ["--model", "x", "--mlx-pth", "y"], capsys)
    assert "required: --mlx-path; did you mean --mlx-path?" in line


def test_unlike_options_get_no_suggestion(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = usage_error(generate.build_parser("generate").parse_args, ["--zzz"], capsys)
    assert line.endswith("unrecognized arguments: --zzz")
    assert usage_error(fastvlm_main, ["--model", "demo"], capsys).endswith("generate --model")


MAINS: dict[str, Callable[[list[str]], int]] = {
    "mlx-fastvlm": fastvlm_main,
    "python -m mlx_fastvlm.generate": generate.main,
    "python -m mlx_fastvlm.check": check.main,
    "mlx-mobileclip": clip_main,
    "python -m convert": convert_main,
}
HELPS = [
    "mlx-fastvlm", "python -m mlx_fastvlm.generate", "mlx-mobileclip", "mlx-mobileclip classify",
    "mlx-mobileclip embed", "mlx-mobileclip evaluate", "python -m convert",
    "python -m mlx_fastvlm.check", "mlx-mobileclip check",
]  # fmt: skip


def run(command_line: str) -> int:
    """Run a command line in this process; returns the exit status."""
    name = next(name for name in MAINS if command_line.startswith(name))
    try:
        return MAINS[name](shlex.split(command_line.removeprefix(name)))
    except SystemExit as ended:
        assert isinstance(ended.code, int)
        return ended.code


@pytest.mark.parametrize("command", HELPS)
def test_help_ends_with_two_examples_that_work_offline(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("MLX_MOBILECLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"How many shapes are there?\n")))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for kind, name in (
        ("heart", "scene.png"),
        ("star", "scene2.png"),
    ):  # any images will do
        (tmp_path / "photos" / kind).mkdir(parents=True)
        (tmp_path / "photos" / kind / name).symlink_to(ROOT / "examples" / name)
    assert run(f"{command} --help") == 0
    _, shown = capsys.readouterr().out.split("\nexamples:\n")
    examples = [line.strip() for line in shown.splitlines()]
    assert len(examples) == 2
    for example in examples:
        assert run(example) == 0, capsys.readouterr().err
        assert "--quiet" not in example and any(capsys.readouterr())
