"""Run a command in several processes with mlx.launch, over loopback."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile

import mlx.core as mx
import pytest

ROOT = Path(__file__).parents[2]
LAUNCHER = Path(sys.executable).with_name("mlx.launch")
needs_launcher = pytest.mark.skipif(
    not LAUNCHER.exists() or not mx.distributed.is_available("ring"),
    reason="mlx.launch or MLX's ring backend is not there",
)


def launch(*command: str, ranks: int = 2, stdin: str = "", timeout: float = 60) -> tuple[str, str]:
    """Run a command in each of the ranks; returns what mlx.launch has on stdout and stderr.

    Its exit status is always 0. stdin stays open, because mlx.launch busy-waits after its end. All
    processes are killed after the timeout.
    """
    options = ("-n", str(ranks), "--backend", "ring", "--starting-port", str(_free_ports(ranks)))
    env = {key: value for key, value in os.environ.items() if not key.startswith("MLX_RANK")}
    with TemporaryFile("w+") as out, TemporaryFile("w+") as err:
        process = subprocess.Popen(
            [str(LAUNCHER), *options, "--", *command],
            cwd=ROOT, env=env | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE, stdout=out, stderr=err, start_new_session=True,
        )  # fmt: skip
        assert process.stdin is not None
        with process.stdin:
            process.stdin.write(stdin.encode())
            process.stdin.flush()
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                err.seek(0)
                pytest.fail(f"still running after {timeout} s; stderr: {err.read()}")
        out.seek(0)
        err.seek(0)
        return out.read(), err.read()


def _free_ports(count: int) -> int:
    """The first of some consecutive ports that nothing listens on."""
    for first in range(20000 + os.getpid() % 10000, 60000, count):
        with ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    pytest.skip("no free ports")
