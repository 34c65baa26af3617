"""Exit status and errors of one command that mlx.launch runs in several processes.

mlx.launch shows the output of all processes, ends all when one fails, and itself exits with 0.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mlx_mobileclip.errors import ModelError
from mlx_mobileclip.terminal import INTERRUPTED, say

RANK = "MLX_RANK"  # set by mlx.launch
# Delay per rank. If one rank fails, mlx.launch ends the others within this time (one or two seconds
# on an idle machine), so an error of all ranks is reported once.
GRACE_S = 4.0


def run_rank(command: Callable[[], int]) -> int:
    """Run a command whose output is shown once, whatever the number of ranks.

    Ranks other than 0 show nothing, except the last line of an error that rank 0 does not have.

    Args:
        command: Returns the exit status, or raises SystemExit.

    Returns:
        The exit status.
    """
    rank = os.environ.get(RANK, "0")
    if rank == "0":
        return command()
    from tempfile import TemporaryFile  # a slow import

    terminal = os.dup(2)
    with TemporaryFile() as errors, open(os.devnull, "w") as null:  # noqa: PTH123
        os.dup2(null.fileno(), 1)
        os.dup2(errors.fileno(), 2)
        try:
            status = command()
        except SystemExit as usage_error:
            status = usage_error.code if isinstance(usage_error.code, int) else 0
        if status not in (0, INTERRUPTED):
            time.sleep(GRACE_S * int(rank))  # the lowest rank that failed reports it
            errors.seek(0)
            lines = errors.read().decode("utf-8", "replace").splitlines()
            os.dup2(terminal, 2)
            say(f"rank {rank}: {lines[-1] if lines else 'failed'}")
    return status


@contextmanager
def report_lost_peers() -> Iterator[None]:
    """Report that another rank has ended, after a delay in which that one can report its error."""
    try:
        yield
    except RuntimeError as error:
        if RANK not in os.environ or "peer" not in str(error):
            raise
        time.sleep(GRACE_S)
        raise ModelError("another rank has ended; see its error, or check its machine") from error
