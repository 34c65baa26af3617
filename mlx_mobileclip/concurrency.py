"""Use MLX safely in a process with threads or forked children.

MLX 0.32.4 caches compiled functions per thread and frees them when the OS thread ends. That takes
the GIL, and aborts the process if Python is shutting down at that moment. Before Python 3.13 `join`
returns before the OS thread has ended, so at exit we wait for all registered threads. A
forked child has none of its parent's threads, including MLX's, and would wait for them forever.
"""

import atexit
import os
import sys
import threading
import time
from pathlib import Path

from .errors import ModelError

WAIT_S = 1.0  # limit for all threads together
FALLBACK_S = 0.05  # if OS threads cannot be listed
TASKS = Path("/proc/self/task")  # on Linux: one directory per OS thread


class _Process:
    """State of this process."""

    uses_mlx = False
    is_forked = False  # from a process that used MLX


class _Thread(threading.local):
    """State of one Python thread."""

    is_registered = False


_process = _Process()
_thread = _Thread()
_workers: set[int] = set()  # native ids of registered threads, without the main one


def register_thread() -> None:
    """Register this thread as a user of MLX; functions that load or run a model call it first.

    Raises:
        ModelError: the process was forked from one that had used MLX.
    """
    if _process.is_forked:
        raise ModelError(
            "this process was forked from one that had loaded a model, and MLX cannot compute "
            "here; start it with multiprocessing's 'spawn' method, or fork before the first load"
        )
    if not _thread.is_registered:
        _thread.is_registered = _process.uses_mlx = True
        if threading.current_thread() is not threading.main_thread():
            _workers.add(threading.get_native_id())


def _after_fork() -> None:
    _process.is_forked = _process.uses_mlx
    _workers.clear()


def _wait_for_workers() -> None:
    """Wait until the OS threads of finished Python threads that used MLX have ended."""
    running = {thread.native_id for thread in threading.enumerate()}
    ended = _workers - running
    if not ended or sys.version_info >= (3, 13):
        return
    if not TASKS.is_dir():
        time.sleep(FALLBACK_S)
        return
    deadline = time.monotonic() + WAIT_S
    while any((TASKS / str(i)).exists() for i in ended) and time.monotonic() < deadline:
        time.sleep(0.001)


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_wait_for_workers)
