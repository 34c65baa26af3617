"""Input of `mlx-fastvlm generate` from stdin."""

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from mlx_fastvlm import load
from mlx_fastvlm.cli.generate import main

ROOT = Path(__file__).parents[2]
PACKAGED_DEMO = ROOT / "mlx_fastvlm" / "demo"
SCENE = ROOT / "examples" / "scene.png"
QUESTION = "What colour is the square?"
ANSWER = "The square is purple.\n"


def run(data: bytes, *options: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run the command in this process, with a file of these bytes as stdin."""
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.seek(0)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(file.raw)))
        return main(["--model", "demo", "--quiet", *options])


@pytest.mark.parametrize("options", [["--prompt", "-"], []])
def test_question_from_stdin(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for data in (QUESTION.encode(), f"\ufeff\n{QUESTION}\r\n".encode()):
        assert run(data, "--image", str(SCENE), *options, monkeypatch=monkeypatch) == 0
        assert capsys.readouterr() == (ANSWER, "")


def test_stdin_is_not_read_when_a_question_is_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--image", str(SCENE), "--prompt", QUESTION)
    assert run(b"Is there a star?", *options, monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out == ANSWER


def test_image_from_stdin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--image", "-", "--prompt", QUESTION)
    assert run(SCENE.read_bytes(), *options, monkeypatch=monkeypatch) == 0
    assert capsys.readouterr() == (ANSWER, "")


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (b"", ["--prompt", "-"], "stdin contains no question"),
        (b"", [], "there is nothing to answer"),
        (b"\xff\xfe", ["--prompt", "-"], "is not UTF-8"),
        (b"", ["--image", "-"], "stdin is empty"),
        (b"text", ["--image", "-"], "not an image"),
        (b"", ["--image", "-", "--prompt", "-"], "stdin can be read only once"),
        (b"", ["--image", "-", "--image", "-"], "stdin can be read only once"),
        (b"", ["--image", "-", "--chat"], "stdin can be read only once"),
        (b"a" * (5 << 20), ["--prompt", "-"], "more than 4 MB"),
    ],
)
def test_unusable_stdin_is_refused(
    data: bytes,
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(data, *options, monkeypatch=monkeypatch) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and message in printed.err


def test_unanswerable_line_does_not_end_a_chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [QUESTION.encode(), b"\xff\xfe", b"a" * (9 << 20), b"word " * 6000, QUESTION.encode()]
    options = ("--image", str(SCENE), "--chat", "--json")
    assert run(b"\n".join(lines), *options, monkeypatch=monkeypatch) == 1
    printed = capsys.readouterr()
    answers = [json.loads(line)["text"] + "\n" for line in printed.out.splitlines()]
    assert answers == [ANSWER, ANSWER]
    reasons = printed.err.splitlines()
    messages = ("not UTF-8", "more than 4 MB", "Shorten it", "questions not answered: 3")
    assert len(reasons) == 4
    assert all(message in line for message, line in zip(messages, reasons, strict=True))


def test_open_pipe_is_not_awaited_when_a_question_is_given() -> None:
    command = [sys.executable, "-m", "mlx_fastvlm.generate", "--model", "demo", "--quiet"]
    with subprocess.Popen(
        [*command, "--prompt", "Hello"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env={**os.environ},
    ) as process:  # fmt: skip
        assert process.wait(30) == 0


def test_default_max_tokens_fits_the_context(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copytree(PACKAGED_DEMO, tmp_path / "short")
    file = tmp_path / "short" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_length": 200}))
    processor: Any = load(tmp_path / "short")[1]
    long = ""
    while (left := processor.max_length - len(processor(long).input_ids)) > 40:
        long += "the "
    assert left > 0
    options = ("--model", str(tmp_path / "short"), "--prompt", long)
    assert run(b"", *options, "--json", monkeypatch=monkeypatch) == 0
    assert json.loads(capsys.readouterr().out)["generation_tokens"] <= left
    assert run(b"", *options, "--max-tokens", "256", monkeypatch=monkeypatch) == 1
    assert (
        f"max_tokens is 256; after a prompt of {processor.max_length - left} tokens it must be"
        in (capsys.readouterr().err)
    )
