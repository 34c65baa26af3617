"""`mlx-fastvlm generate` in several processes: one answer, one error, and no deadlock."""

import os
import shlex
import shutil
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from launch import launch, needs_launcher

from mlx_fastvlm.cli.generate import build_parser
from mlx_fastvlm.cli.shared_input import share_inputs
from mlx_fastvlm.loader import DEMO_DIRECTORY
from mlx_fastvlm.models.sharding import join
from mlx_mobileclip.errors import ModelError, PromptError

GENERATE = (sys.executable, "-m", "mlx_fastvlm.generate")
QUESTION = "How many circles are there?"


def shell_command(*options: str) -> tuple[str, ...]:
    """The command in a shell, so that options can contain $MLX_RANK."""
    return ("bash", "-c", f"exec {shlex.join(GENERATE)} {' '.join(options)}")


@needs_launcher
def test_chat_is_read_and_answered_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Only rank 0 has the image; an empty line ends the chat, as mlx.launch keeps stdin open."""
    shutil.copy("examples/scene.png", tmp_path / "scene0")
    options = ("--model", "demo", "--max-tokens", "2", "--temp", "2", "--top-p", "0.9")
    command = shell_command(*options, "--chat", "--image", f"{tmp_path}/scene$MLX_RANK")
    out, err = launch(*command, stdin=f"{QUESTION}\nHello\n\n", timeout=170)
    assert len(out.splitlines()) == 2, err
    assert err.count("loaded demo") == 1 and err.count("first token after") == 2
    assert "error" not in err and "[ring]" not in err


def test_question_from_stdin_ends_with_an_empty_line(monkeypatch: pytest.MonkeyPatch) -> None:
    args = build_parser("generate").parse_args(["--prompt", "-", "--image", "examples/scene.png"])
    read, write = os.pipe()
    os.write(write, b"How many\ncircles?\n\nmore")
    with open(read) as stdin, open(write, "w"):  # noqa: PTH123
        monkeypatch.setattr(sys, "stdin", stdin)
        prompt, images = share_inputs(args, mx.distributed.init())
    assert prompt == "How many\ncircles?"
    assert images == [Path("examples/scene.png").read_bytes()]


def test_image_from_stdin_is_refused() -> None:
    args = build_parser("generate").parse_args(["--image", "-"])
    with pytest.raises(PromptError, match=r"does not pass on the end of stdin.*; give --image"):
        share_inputs(args, mx.distributed.init())


def test_single_rank_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mlx.launch -n 1 sets a rank, and an empty list of hosts."""
    (tmp_path / "hosts").write_text("\n")
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts"))
    with pytest.raises(ModelError, match="start at least two"):
        join()


def test_one_process_does_not_start_mlx_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLX_RANK", raising=False)
    monkeypatch.setattr(mx.distributed, "init", None)
    assert join() is None


@needs_launcher
@pytest.mark.parametrize(
    ("options", "ranks", "message"),
    [
        (["--prompt", "q"], 3, "8 heads with 2 for keys and values cannot be divided among 3"),
        (["--image", "missing.png"], 2, "missing.png: no such file"),
        (["--max-tokens", "many"], 2, "argument --max-tokens"),
    ],
)
def test_error_of_all_is_shown_once(options: list[str], ranks: int, message: str) -> None:
    out, err = launch(*GENERATE, "--model", "demo", *options, ranks=ranks, timeout=170)
    assert not out
    assert err.count("error: ") == 1 and message in err, err
    assert "Traceback" not in err


@needs_launcher
def test_error_of_one_rank_is_shown_and_ends_all(tmp_path: Path) -> None:
    """Rank 1 lacks the model, and rank 0 would wait for it."""
    (tmp_path / "model0").symlink_to(DEMO_DIRECTORY)
    command = shell_command("--model", f"{tmp_path}/model$MLX_RANK", "--prompt", "q")
    out, err = launch(*command, timeout=170)
    assert not out
    assert err.count("error: ") == 1, err
    assert "rank 1: error: " in err and "model1" in err
