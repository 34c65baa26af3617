"""What depends on the device that MLX computes on by default."""

import ctypes
import os
import platform
import threading
import weakref
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import mlx.core as mx

from .errors import ConfigError

PARALLEL_FROM = 1 << 17  # elements; of fewer, a thread takes longer to hear than to work
LARGEST_PART = 1 << 22  # elements; with a quarter FastViTHD takes 150 MB less, and a ninth longer
WIDENED = 4  # times its input, the largest array of a block of the towers, attention aside
# Of glibc's mallopt, from malloc.h.
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4
KEPT_BYTES = 1 << 30
Part = TypeVar("Part")
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
        work: The part of the result from an index to another. What it divides in turn stays on
            its core.
        length: What the indices go up to.
        axis: Along which the parts are joined; the first that is longer than one costs least.
        makes: Elements of the largest array that all the work makes on its way, which tells
            whether dividing it pays. Parts are small enough to keep that to LARGEST_PART, and so
            memory, if the length allows.

    Returns:
        What work(0, length) returns.
    """
    parts = in_parts(work, length, makes)
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis)


def in_parts(work: Callable[[int, int], Part], length: int, makes: int) -> list[Part]:
    """What `on_all_cores` would join, in order."""
    if makes < PARALLEL_FROM or length < 2:
        return [work(0, length)]
    at_work = _thread.at_work
    streams = [mx.default_stream(mx.cpu)] if at_work else _streams()
    rounds = max(1, -(-makes // (LARGEST_PART * len(streams))))
    count = min(rounds * len(streams), length)
    if count == 1:
        return [work(0, length)]
    parts = []
    _thread.at_work = True
    try:
        for i in range(count):
            with mx.stream(streams[i % len(streams)]):
                parts.append(work(length * i // count, length * (i + 1) // count))
    finally:
        _thread.at_work = at_work
    return parts


def enough_items(x: mx.array) -> bool:
    """Whether each core of a CPU can take some of a batch."""
    return on_cpu() and len(x) >= cores()


def by_items(layer: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
    """What a layer, or several, make of a batch; on a CPU a core takes some items at a time.

    Fewer items than cores are left to what the layer itself divides.
    """
    if not enough_items(x):
        return layer(x)
    done: list[mx.array] = []

    def work(start: int, stop: int) -> mx.array:
        part = x[start:stop]
        if len(done) >= cores():
            # After the core's last part: MLX would begin them all, and hold what each makes.
            part = mx.depends([part], [done[-cores()]])[0]
        done.append(layer(part))
        return done[-1]

    return on_all_cores(work, len(x), axis=0, makes=WIDENED * x.size)


class _Streams(list[mx.Stream]):
    """A list whose end can be noticed."""


class _Thread(threading.local):
    """What each thread has of its own."""

    streams: _Streams | None = None
    at_work = False  # on a part


_thread = _Thread()
_handed_on: list[list[mx.Stream]] = []  # by threads that have ended


def _streams() -> list[mx.Stream]:
    """One for each core: the thread's default stream, and others that no other thread uses.

    MLX does not end those of a thread that has ended, so the next one is given them.
    """
    if _thread.streams is None:
        _leave_products_to_one_thread()
        try:
            others = _handed_on.pop()
        except IndexError:
            others = [mx.new_thread_unsafe_stream(mx.cpu) for _ in range(1, cores())]
        _thread.streams = _Streams(others)
        weakref.finalize(_thread.streams, _handed_on.append, others)
    return [mx.default_stream(mx.cpu), *_thread.streams]


@cache
def cores() -> int:
    """Cores that the process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _leave_products_to_one_thread() -> None:
    """Have OpenBLAS, if it is the process's BLAS, start no threads beside those of the streams."""
    set_threads = getattr(ctypes.CDLL(None), "openblas_set_num_threads", None)
    if set_threads is not None:
        set_threads(1)


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
