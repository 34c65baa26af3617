"""The command line of mlx_fastvlm, mostly in subprocesses."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
from PIL import Image

from mlx_fastvlm import FastVLM, generate, load
from mlx_fastvlm.__main__ import main as dispatch
from mlx_fastvlm.cli.generate import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write_layout(tmp_path_factory.mktemp("tiny"), "fast_vlm")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "a.png"
    Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(path)
    return path


def command(*options: Any, module: str = "mlx_fastvlm.generate") -> list[str]:
    return [sys.executable, "-m", module, *map(str, options)]


def run(*options: Any, **settings: Any) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", **settings.pop("env", {})}
    return subprocess.run(
        command(*options, **settings),
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_answer_on_stdout_and_the_rest_on_stderr(model: Path, image: Path) -> None:
    options = ("--image", image, "--resolution", 256, "--max-tokens", 6)
    result = run("--model", model, *options)
    assert result.returncode == 0
    assert re.search(r"loaded .* \(\d+\.\d s\)\n", result.stderr)
    assert re.search(r"prompt \d+ tokens \(16 image\), first token after", result.stderr)
    quiet = run("--model", model, *options, "--quiet")
    assert quiet.stdout == result.stdout and quiet.stderr == ""


def test_json_has_the_documented_fields(model: Path, image: Path) -> None:
    result = run(
        "--model", model, "--image", image, image, "--prompt", "q", "--json",
        "--max-tokens", 5, "--resolution", 320, "--image-mode", "crop", "--seed", 1, "--temp", 0.7,
        "--top-p", 0.9, "--top-k", 40, "--min-p", 0.01, "--repetition-penalty", 1.1,
        "--stop", "zzz", "--system", "s", "--dtype", "float32",
    )  # fmt: skip
    report = json.loads(result.stdout)
    assert list(report) == [
        "text", "token_ids", "finish_reason", "model", "image_tokens", "prompt_tokens",
        "generation_tokens", "timings", "peak_memory_bytes",
    ]  # fmt: skip
    times = ["load_s", "preprocess_s", "vision_s", "prefill_s", "ttft_s", "decode_tokens_per_s"]
    assert list(report["timings"]) == times
    assert report["image_tokens"] == 50 and report["generation_tokens"] == 5
    assert report["finish_reason"] in ("stop", "length") and report["model"] == str(model)


def test_chat_continues_one_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each line of stdin is a further question of one conversation about the images."""
    image = ROOT / "examples" / "scene.png"
    questions = ["How many circles are there?", "What colour is the square?"]
    demo, messages, expected = load("demo"), [], []
    for question in questions:
        messages.append({"role": "user", "content": question})
        expected.append(generate(*demo, messages, image).text)
        messages.append({"role": "assistant", "content": expected[-1]})
    options = ["--model", "demo", "--image", str(image), "--chat", "--quiet"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"\n{questions[1]}\n".encode())))
    assert main([*options, "--prompt", questions[0]]) == 0
    assert capsys.readouterr() == ("".join(f"{text}\n" for text in expected), "")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(questions).encode())))
    assert main([*options, "--json"]) == 0
    answers = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    assert answers == expected


def test_image_cache_option_keeps_embeddings(
    model: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--model", str(model), "--image", str(image), "--max-tokens", "2", "--quiet"]
    options += ["--image-cache", str(tmp_path / "kept")]
    assert main(options) == 0
    assert len(list((tmp_path / "kept").iterdir())) == 1
    monkeypatch.setattr(FastVLM, "encode_image", None)
    assert main(options) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "./nowhere"], "error: ./nowhere: no such directory"),
        (["--image", "nowhere.jpg"], "error: nowhere.jpg: no such file"),
        (["--image", "https://a.b/c.jpg"], "URLs are not opened"),
        (["--max-tokens", "9000"], "max_tokens is 9000; after a prompt of"),
        (["--temp", "nan"], "error: temperature is nan"),
        (["--resolution", "1000"], "in steps of 64"),
        (["--vision-from", "."], "leave out --vision-from"),
    ],
)
def test_errors_take_one_line_and_exit_1(model: Path, options: list[str], message: str) -> None:
    result = run(*([] if "--model" in options else ["--model", model]), "--prompt", "q", *options)
    assert result.returncode == 1 and result.stdout == ""
    lines = [
        line for line in result.stderr.splitlines() if not line.startswith(("loaded", "note:"))
    ]
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


def test_neither_image_nor_prompt_is_an_error(model: Path) -> None:
    result = run("--model", model)
    assert result.returncode == 1
    assert result.stderr == "error: there is nothing to answer; give --image, --prompt or both\n"


def test_debug_shows_the_traceback(model: Path) -> None:
    result = run("--model", "./nowhere", "--prompt", "q", "--debug")
    assert result.returncode == 1 and "Traceback" in result.stderr


@pytest.mark.parametrize(
    "options", [["--nonsense"], ["--max-tokens", "x"], ["--preset", "sing"],
                ["--preset", "read", "--prompt", "q"]],
)  # fmt: skip
def test_usage_errors_exit_2(options: list[str]) -> None:
    result = run(*options)
    assert result.returncode == 2 and "usage:" in result.stderr


def test_repository_without_network_or_cache_is_refused(tmp_path: Path) -> None:
    result = run("--model", "apple/FastVLM-0.5B", "--prompt", "q", env={"HF_HOME": str(tmp_path)})
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert (
        "not in the cache, and huggingface.co cannot be reached; connect and run" in result.stderr
    )


def test_interrupt_exits_130(model: Path) -> None:
    options = ("--model", model, "--prompt", "q", "--max-tokens", 8000, "--temp", 0)
    with subprocess.Popen(
        command(*options), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        stderr = process.stderr.read()
    assert process.returncode == 130
    assert "Traceback" not in stderr and stderr.endswith("interrupted\n")


def test_closed_pipe_is_quiet(model: Path) -> None:
    options = ("--model", model, "--prompt", "q", "--max-tokens", 8000, "--temp", 0, "--quiet")
    with subprocess.Popen(
        command(*options), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        stderr = process.stderr.read()
    assert process.returncode == 130 and stderr == ""


def test_convert_then_generate(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    result = run("--model", model, "--mlx-path", target, "--dtype", "float32", module="convert")
    assert result.returncode == 0 and result.stdout == ""
    assert "read" in result.stderr and "wrote" in result.stderr
    answers = [
        run("--model", m, "--prompt", "q", "--max-tokens", 9, "--json") for m in (model, target)
    ]
    ours, theirs = (json.loads(answer.stdout)["token_ids"] for answer in answers)
    assert ours == theirs


def test_help_is_quick(model: Path) -> None:
    """Heavy imports are delayed until needed."""
    started = time.perf_counter()
    assert run("--help").returncode == 0
    assert time.perf_counter() - started < 2


def test_console_script_runs_the_same_command(
    model: Path, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(model), "--image", str(image), "--max-tokens", "3", "--quiet"]
    assert main(options) == 0
    answer = capsys.readouterr().out
    assert dispatch(["generate", *options]) == 0
    assert capsys.readouterr().out == answer


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "required: COMMAND"),
        (["describe"], 2, "invalid choice: 'describe'"),
        (["--model", "demo"], 2, "give a command first, such as: mlx-fastvlm generate --model"),
        (["generate", "--nothing"], 2, "usage: mlx-fastvlm generate"),
        (["--help"], 0, "answer a question about images"),
        (["generate", "--help"], 0, "usage: mlx-fastvlm generate"),
    ],
)
def test_usage_of_the_console_script(
    arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        dispatch(arguments)
    assert end.value.code == status
    printed = capsys.readouterr()
    assert message in printed.out + printed.err
