"""Limit on the memory of image decoders, shared by all threads of the process."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

MAX_DECODER_BYTES = 850_000_000  # leaves room for a model on a Mac of 8 GB


class MemoryBudget:
    """Memory that threads reserve and release; a reservation waits until enough is free.

    Attributes:
        left: Free bytes.
    """

    def __init__(self, total: int):
        self.left = total
        self._changed = threading.Condition()

    @contextmanager
    def reserve(self, count: int) -> Iterator[None]:
        """Reserve memory for the duration of a `with` block; a thread must not nest reservations.

        Args:
            count: Number of bytes, at most the total.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.left >= count)
            self.left -= count
        try:
            yield
        finally:
            with self._changed:
                self.left += count
                self._changed.notify_all()


DECODER_MEMORY = MemoryBudget(MAX_DECODER_BYTES)
