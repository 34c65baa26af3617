"""What depends on the device that MLX computes on by default."""

import ctypes
import os
import platform
import threading
from collections.abc import Callable
from functools import cache

import mlx.core as mx

from .errors import ConfigError

PARALLEL_FROM = 1 << 18  # elements; of fewer, a thread takes longer to hear than to work
LARGEST_PART = 1 << 20  # elements; with four times as many FastViTHD takes 300 MB more
# Of glibc's mallopt, from malloc.h.
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4
KEPT_BYTES = 1 << 30
DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


def on_cpu() -> bool:
    """Whether the default device is the CPU."""
    return mx.default_device() == mx.Device(mx.cpu)


def on_metal() -> bool:
    """Whether the default device is an Apple GPU."""
    return not on_cpu() and mx.metal.is_available()


def keep_freed_memory() -> None:
    """Have the process keep about 1 GiB of freed memory, if MLX computes on the CPU under glibc.

    On a GPU MLX itself keeps freed arrays for later ones. Its CPU backend frees each, glibc gives
    large ones back to the system, and the next is mapped and zeroed page by page, a sixth of
    the time of a pass through FastViTHD (AMD EPYC, two cores, MLX 0.32.4, 2026-11-23).
    """
    if on_cpu() and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_MAX, 0)  # large arrays too come from the heap
        libc.mallopt(TRIM_THRESHOLD, KEPT_BYTES)
        libc.mallopt(TOP_PAD, 1 << 26)  # by how much it grows at a time


def on_all_cores(
    work: Callable[[int, int], mx.array], length: int, axis: int, makes: int
) -> mx.array:
    """Let the cores of the CPU do parts of what MLX's CPU backend does on one thread a stream.

    Args:
        work: The part of the result from an index to another.
        length: What the indices go up to.
        axis: Along which the parts are joined; the first that is longer than one costs least.
        makes: Elements of the largest array that all the work makes on its way. Parts are small
            enough to keep that to LARGEST_PART, and so memory, if the length allows.

    Returns:
        What work(0, length) returns.
    """
    # MLX's streams are good only in the thread that made them.
    here = threading.current_thread() is threading.main_thread()
    streams = _streams() if here else [mx.default_stream(mx.cpu)]
    count = min(max(len(streams), makes // LARGEST_PART), length)
    if count < 2 or makes < PARALLEL_FROM:
        return work(0, length)
    parts = []
    for i in range(count):
        with mx.stream(streams[i % len(streams)]):
            parts.append(work(length * i // count, length * (i + 1) // count))
    return mx.concatenate(parts, axis)


@cache
def _streams() -> list[mx.Stream]:
    others = range(1, os.cpu_count() or 1)
    return [mx.default_stream(mx.cpu), *(mx.new_stream(mx.cpu) for _ in others)]


def default_dtype() -> mx.Dtype:
    """float16 on a GPU; float32 on a CPU, where half precision is slow."""
    return mx.float32 if on_cpu() else mx.float16


def parse_dtype(dtype: str | mx.Dtype | None) -> mx.Dtype:
    """The dtype of that name; the default for this device if None."""
    if dtype is None:
        return default_dtype()
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        return DTYPES[dtype]
    return dtype
