"""Bound what Python allocates while a block runs."""

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def python_memory_below(limit: int) -> Iterator[None]:
    """Fail if more than `limit` bytes are allocated at once; tracing ends in any case."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()
