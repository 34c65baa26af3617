"""Download progress in a terminal."""

import fcntl
import os
import pty
import struct
import sys
import termios
import threading
from pathlib import Path

import synthetic
from hub_server import REPOSITORY, HubServer

ROOT = Path(__file__).parents[2]


def run_in_terminal(command_line: list[str], environment: dict[str, str]) -> bytes:
    """Run a command in a terminal of 80 columns; returns its output."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(ROOT)
        os.execve(command_line[0], command_line, environment)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    output = b""
    while True:
        try:
            chunk = os.read(terminal, 4096)
        except OSError:  # the command has ended
            chunk = b""
        if not chunk:
            os.close(terminal)
            assert os.waitpid(child, 0)[1] == 0, output
            return output
        output += chunk


def test_size_and_progress_are_shown_before_the_answer_only(tmp_path: Path) -> None:
    server = HubServer(synthetic.write_layout(tmp_path / "repository", "llava_qwen2"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    unset = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS")  # may be set by other tests
    environment = {k: v for k, v in os.environ.items() if k not in unset}
    environment |= {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "cache")}
    command_line = [sys.executable, "-m", "mlx_fastvlm.generate", "--model", REPOSITORY]
    command_line += ["--image", "examples/scene.png", "--prompt", "Hi", "--max-tokens", "3"]
    try:
        output = run_in_terminal(command_line, environment)
    finally:
        server.shutdown()
        server.server_close()
    download, answer = output.split(b"loading someone/FastVLM-tiny")
    size = sum(file.stat().st_size for file in server.directory.iterdir())
    assert f"{size / 1e6:.2f}MB".encode() in download and b"100%" in download
    assert b"%" not in answer and b"ownload" not in answer
