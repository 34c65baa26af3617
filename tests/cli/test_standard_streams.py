"""Commands work with closed or full standard streams."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMAGE = str(ROOT / "examples/scene.png")
COMMANDS = {
    "generate": ["mlx_fastvlm.generate", "--image", IMAGE, "--max-tokens", "2"],
    "mlx-fastvlm": ["mlx_fastvlm", "generate", "--image", IMAGE, "--max-tokens", "2"],
    "chat": ["mlx_fastvlm.generate", "--image", IMAGE, "--chat", "--max-tokens", "2"],
    "classify": ["mlx_mobileclip", "classify", "--image", IMAGE, "--labels", "a,b"],
    "embed": ["mlx_mobileclip", "embed", "--images", IMAGE, "--output", "out.npz"],
    "convert": ["convert", "--mlx-path", "out"],
}
CLOSED = ("<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-")
WRITES = ("embed", "convert")


def run(name: str, redirection: str, directory: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *COMMANDS[name], "--model", "demo"]
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", *command],
        cwd=directory,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT), "MLX_MOBILECLIP_CACHE": str(directory)},
    )


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("redirection", CLOSED)
def test_closed_streams(name: str, redirection: str, tmp_path: Path) -> None:
    result = run(name, redirection, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Error" not in result.stderr and "error" not in result.stderr
    assert bool(result.stdout) == (
        ">&-" not in redirection.split() and name not in ("chat", *WRITES)
    )
    assert bool(result.stderr) == ("2>&-" not in redirection.split())
    assert not [*tmp_path.glob("out*")] or name in WRITES
    assert [*tmp_path.glob("out*")] or name not in WRITES


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["generate", "classify", "embed", "convert"])
def test_full_stderr(name: str, tmp_path: Path) -> None:
    result = run(name, "2>/dev/full", tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout or [*tmp_path.glob("out*")]


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "<&- >&- 2>&-"])
def test_exit_status_of_errors_is_kept(redirection: str, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("in use")
    assert run("convert", redirection, tmp_path).returncode == 1
    result = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, "-m", "convert", "--bogus"],
        cwd=ROOT,
        capture_output=True,
        timeout=60,
    )
    assert result.returncode == 2
