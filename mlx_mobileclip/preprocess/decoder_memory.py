"""How much memory image decoders may hold at once, in all threads of the process together."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

MAX_DECODER_BYTES = 850_000_000  # leaves room for a model on a Mac of 8 GB


class MemoryBudget:
    """Bytes that are lent and given back; who asks for more than is left waits.

    Attributes:
        left: How many may still be lent.
    """

    def __init__(self, total: int):
        self.left = total
        self._changed = threading.Condition()

    @contextmanager
    def reserve(self, count: int) -> Iterator[None]:
        """Hold some bytes for the length of a block; one block must not be within another.

        Args:
            count: How many; at most as many as there are in all.
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


DECODERS = MemoryBudget(MAX_DECODER_BYTES)
