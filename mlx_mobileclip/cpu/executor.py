"""Divide an operation among the cores of the CPU.

Unnecessary once MLX's CPU backend runs an operation on several threads; today each stream has one.
"""

import os
import threading
import weakref
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import mlx.core as mx

PARALLEL_FROM = 1 << 17  # elements; below this, starting a thread costs more than the work
LARGEST_PART = 1 << 22  # elements; with 1 << 20 FastViTHD takes 150 MB less and a ninth longer
EXPANSION = 4  # largest array within a block of a tower, relative to the block's input
Part = TypeVar("Part")


def on_all_cores(
    work: Callable[[int, int], mx.array], length: int, axis: int, work_size: int
) -> mx.array:
    """Compute a result in parts, one core each, and join them.

    Args:
        work: Computes the part of the result from one index to another. Nested calls stay on the
            same core.
        length: Number of indices.
        axis: Axis along which the parts are joined.
        work_size: Elements of the largest intermediate array. It decides whether the work is
            divided; if possible, the share of each part is below LARGEST_PART.

    Returns:
        The value of work(0, length).
    """
    parts = in_parts(work, length, work_size)
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis)


def in_parts(work: Callable[[int, int], Part], length: int, work_size: int) -> list[Part]:
    """Like `on_all_cores`, but return the parts in order, without joining them."""
    if work_size < PARALLEL_FROM or length < 2:
        return [work(0, length)]
    workers = 1 if _thread.is_working else cores()
    rounds = max(1, -(-work_size // (LARGEST_PART * workers)))
    count = min(rounds * workers, length)
    return each(lambda i: work(length * i // count, length * (i + 1) // count), count)


def each(work: Callable[[int], Part], count: int) -> list[Part]:
    """Compute work(0) to work(count - 1); part i always runs on the same core."""
    if count == 1:
        return [work(0)]
    was_working = _thread.is_working
    streams = [mx.default_stream(mx.cpu)] if was_working else _streams()
    parts = []
    _thread.is_working = True
    try:
        for i in range(count):
            with mx.stream(streams[i % len(streams)]):
                parts.append(work(i))
    finally:
        _thread.is_working = was_working
    return parts


def by_items(layer: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
    """Apply a layer to a batch, each core taking some items at a time.

    Args:
        layer: A layer that treats the items of a batch independently.
        x: Batch with at least as many items as cores.
    """
    done: list[mx.array] = []

    def work(start: int, stop: int) -> mx.array:
        part = x[start:stop]
        if len(done) >= cores():
            # Wait for this core's last part, or MLX would run all parts and use memory for all.
            part = mx.depends([part], [done[-cores()]])[0]
        done.append(layer(part))
        return done[-1]

    return on_all_cores(work, len(x), axis=0, work_size=EXPANSION * x.size)


@cache
def cores() -> int:
    """Number of cores that the process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Streams(list[mx.Stream]):
    """A list that can be weakly referenced."""


class _Thread(threading.local):
    """State of one Python thread."""

    streams: _Streams | None = None
    is_working = False  # whether it is computing a part


_thread = _Thread()
_released: list[list[mx.Stream]] = []  # streams of threads that have ended


def _streams() -> list[mx.Stream]:
    """One stream for each core: the thread's default stream, and others that only it uses.

    MLX never frees a stream, so new threads reuse those of threads that have ended.
    """
    if _thread.streams is None:
        try:
            others = _released.pop()
        except IndexError:
            others = [mx.new_thread_unsafe_stream(mx.cpu) for _ in range(1, cores())]
        _thread.streams = _Streams(others)
        weakref.finalize(_thread.streams, _released.append, others)
    return [mx.default_stream(mx.cpu), *_thread.streams]
