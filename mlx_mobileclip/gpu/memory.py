"""Limits on MLX's cached and wired memory, depending on the machine."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from ..device import backend, memory_bytes

SMALL_BYTES = 12 << 30  # machines with at most this memory get the smaller limit: Macs with 8 GB
SMALL_CACHE_BYTES = 256 << 20
CACHE_BYTES = 1 << 30


def cache_limit(memory: int | None) -> int:
    """Cache limit in bytes for a machine with `memory` bytes.

    By default MLX caches all freed memory: too much after a 1024 px image on a Mac with 8 GB.
    """
    small = memory is not None and memory <= SMALL_BYTES
    return SMALL_CACHE_BYTES if small else CACHE_BYTES


def limit_cache() -> None:
    """Set MLX's cache limit; called by every command at startup, and never by the API."""
    mx.set_cache_limit(cache_limit(memory_bytes()))


class _Wired:
    """Number of running answers, and the wired limit before the first of them."""

    lock = threading.Lock()
    answers = 0
    limit_before = 0


@contextmanager
def wired_weights() -> Iterator[None]:
    """Keep the model's memory wired within the block, as mlx-lm does while it generates.

    Otherwise macOS may page out weights between two tokens. Blocks may overlap in time. Does
    nothing on other systems.
    """
    key = "max_recommended_working_set_size"
    size = mx.device_info().get(key) if backend() == "metal" else None
    if not size:
        yield
        return
    with _Wired.lock:
        if not _Wired.answers:
            _Wired.limit_before = mx.set_wired_limit(int(size))
        _Wired.answers += 1
    try:
        yield
    finally:
        with _Wired.lock:
            _Wired.answers -= 1
            if not _Wired.answers:
                mx.synchronize()
                mx.set_wired_limit(_Wired.limit_before)
