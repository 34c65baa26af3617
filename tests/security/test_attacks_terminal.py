"""Control characters in names of checkpoints and files do not reach a terminal."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import isolated
import mlx.core as mx
import pytest
import synthetic

from mlx_fastvlm.cli import generate
from mlx_mobileclip.checkpoints.safetensors import read_safetensors
from mlx_mobileclip.errors import CheckpointError
from mlx_mobileclip.terminal import Bar, printable, progress, run_command, say

ROOT = Path(__file__).parents[2]
EVIL = "a\x1b]0;owned\x07\x9b2J\r\u202ecod.exe\u2028"
HARMLESS = "a]0;owned2Jcod.exe"


def fail(error: Exception) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


def wait() -> None:
    with progress(EVIL, quiet=False) as set_status:
        set_status(EVIL)


def count() -> None:
    with Bar(1, "images") as bar:
        bar.say(EVIL)


MESSAGES: dict[str, Callable[[], object]] = {
    "say": lambda: say(EVIL),
    "progress": wait,
    "bar": count,
    "an unexpected error": lambda: run_command(fail(RuntimeError(EVIL)), debug=False),
    "a traceback": lambda: run_command(fail(RuntimeError(EVIL)), debug=True),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_have_no_control_characters(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    MESSAGES[name]()
    err = capsys.readouterr().err
    assert HARMLESS in err.replace("2J cod", "2Jcod")  # white space in an error becomes one space
    assert printable(err, keep="\n") == err


def test_usage_errors_have_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    """A shell expands a star to names of files."""
    with pytest.raises(SystemExit):
        generate.main([EVIL])
    err = capsys.readouterr().err
    assert HARMLESS in err and printable(err, keep="\n") == err


def test_scripts_and_emoji_are_kept() -> None:
    for text in ("日本", "עברית", "क्\u200dष", "👩\u200d💻", "é"):
        assert printable(text) == text


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in a directory whose name has control characters."""
    return synthetic.write_layout(tmp_path_factory.mktemp("names") / EVIL, "llava_qwen2")


def test_output_and_files_have_no_control_characters(evil: Path, tmp_path: Path) -> None:
    target = tmp_path / f"out{EVIL}"
    for command in (
        ["mlx_fastvlm.generate", "--model", str(evil), "--prompt", "q", "--max-tokens", "1"],
        ["convert", "--model", str(evil), "--mlx-path", str(target)],
    ):
        result = subprocess.run(
            [sys.executable, "-m", *command],
            capture_output=True,
            env=isolated.ENVIRONMENT,
            timeout=60,
        )
        err = result.stderr.decode()
        assert result.returncode == 0, err
        assert HARMLESS in err and printable(err, keep="\n") == err
    for name in ("NOTICE", "README.md"):
        text = (target / name).read_text(encoding="utf-8")
        assert HARMLESS in text and printable(text, keep="\n") == text


def test_files_that_mlx_cannot_open_are_checkpoint_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / os.fsdecode(b"\xff.safetensors")
    mx.save_safetensors(str(tmp_path / "x.safetensors"), {"a": mx.ones(3)})
    (tmp_path / "x.safetensors").rename(odd)
    with pytest.raises(CheckpointError, match="is not UTF-8"):
        read_safetensors(odd)

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(f"[load_safetensors] {EVIL}")

    odd.rename(tmp_path / "x.safetensors")
    monkeypatch.setattr(mx, "load", refuse)
    with pytest.raises(CheckpointError, match="download it again") as caught:
        read_safetensors(tmp_path / "x.safetensors")
    assert str(caught.value).isprintable()
