"""Vectors of the index: float16 in chunks of 1,024 rows, scanned as a whole.

The first scan of a process converts float16 as it goes. A second one shows that more will follow,
so it keeps the rows as int8, each with its own scale, which takes a quarter of the time. Both give
scores for choosing candidates, whose rows are then read exactly.
"""

import os
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError

CHUNK_ROWS = 1024
BLOCK_ROWS = 256  # converted at once: fits a core's cache
TASK_ROWS = 8192  # that a core takes at once
MAX_DIM = 8192
# float16's bits, moved to where float32 has them, are the same number times 2^-112.
TO_FLOAT32 = np.float32(2.0**112)
SIGN_AND_BITS = np.int32(-0x70002000)  # 0x8fffe000


def write_vectors(
    connection: sqlite3.Connection, slots: Sequence[int], rows: NDArray[np.float16]
) -> None:
    """Write rows (N, E) to their slots; new slots follow the last one without a gap."""
    dim = rows.shape[1]
    by_chunk: dict[int, list[int]] = {}
    for i, slot in enumerate(slots):
        by_chunk.setdefault(slot // CHUNK_ROWS, []).append(i)
    for chunk, indices in by_chunk.items():
        found = connection.execute("SELECT rows FROM vector WHERE chunk=?", (chunk,)).fetchone()
        old = np.frombuffer(found[0], np.float16).reshape(-1, dim) if found else rows[:0]
        places = np.array([slots[i] % CHUNK_ROWS for i in indices])
        new = np.zeros((max(len(old), places.max() + 1), dim), np.float16)
        new[: len(old)] = old
        new[places] = rows[indices]
        connection.execute("INSERT OR REPLACE INTO vector VALUES(?, ?)", (chunk, new.tobytes()))


def take_slots(connection: sqlite3.Connection, count: int) -> list[int]:
    """Slots for new rows: freed ones first, then new ones at the end."""
    freed = connection.execute("SELECT slot FROM free_slot LIMIT ?", (count,)).fetchall()
    connection.executemany("DELETE FROM free_slot WHERE slot=?", freed)
    slots = [slot for (slot,) in freed]
    [last] = connection.execute("SELECT max(slot) FROM file").fetchone()
    [last_free] = connection.execute("SELECT max(slot) FROM free_slot").fetchone()
    end = max(-1 if last is None else last, -1 if last_free is None else last_free, *slots, -1) + 1
    return slots + list(range(end, end + count - len(slots)))


class Vectors:
    """All vectors of an index in memory: as stored, and from the second scan on as int8, too."""

    def __init__(self, connection: sqlite3.Connection, dim: int):
        """Read the vectors, which stay as they are stored: 2 bytes a number.

        Raises:
            DataError: a chunk has not the size that it must have.
        """
        if not 1 <= dim <= MAX_DIM:
            raise DataError(f"the index has vectors of {dim} numbers; run index with --rebuild")
        self.dim = dim
        # The sizes are checked first, as a hostile blob may be large.
        sizes = connection.execute("SELECT chunk, length(rows) FROM vector ORDER BY chunk")
        counts = []
        for expected, (chunk, size) in enumerate(sizes.fetchall()):
            if chunk != expected or size % (2 * dim) or not 0 < size <= 2 * dim * CHUNK_ROWS:
                raise DataError(f"chunk {chunk} of the index is damaged; run index with --rebuild")
            counts.append(size // (2 * dim))
        if any(count != CHUNK_ROWS for count in counts[:-1]):
            raise DataError("a chunk of the index is damaged; run index with --rebuild")
        self._bits = np.empty((sum(counts), dim), np.int16)  # of float16
        for chunk, count in enumerate(counts):
            found = connection.execute("SELECT rows FROM vector WHERE chunk=?", (chunk,)).fetchone()
            if found is None or len(found[0]) < 2 * dim * count:
                raise DataError("the index has just been rebuilt; run the same command again")
            rows = np.frombuffer(found[0], "<i2", count * dim).reshape(count, dim)
            self._bits[chunk * CHUNK_ROWS :][:count] = rows
        connection.execute("PRAGMA shrink_memory")  # pages that were read
        self._quantized: tuple[NDArray[np.int8], NDArray[np.float32]] | None = None
        self._scans = 0

    def __len__(self) -> int:
        return len(self._bits)

    def scores(self, queries: NDArray[np.float32]) -> NDArray[np.float32]:
        """Cosine similarities of queries (Q, E), unit rows, with all rows: float32 (Q, N).

        Exact to about 0.002.
        """
        self._scans += 1
        if self._scans == 2:
            self._quantized = self._quantize()
        result = np.empty((len(self), len(queries)), np.float32)
        columns = np.ascontiguousarray(queries.T)
        if self._quantized is None:
            columns = columns * TO_FLOAT32
        _in_threads(lambda start: self._score(start, columns, result), len(self))
        return result.T

    def rows(self, slots: Sequence[int] | NDArray[np.intp]) -> NDArray[np.float32]:
        """Rows of slots exactly as stored: float32 (N, E)."""
        picked = self._bits[np.asarray(slots, np.intp)]
        return picked.view(np.float16).astype(np.float32)

    def _score(self, start: int, columns: NDArray[np.float32], result: NDArray[np.float32]) -> None:
        """Score the rows from `start` on that one task has, block by block."""
        block = np.empty((BLOCK_ROWS, self.dim), np.float32)
        for first in range(start, min(start + TASK_ROWS, len(self)), BLOCK_ROWS):
            place = slice(first, min(first + BLOCK_ROWS, start + TASK_ROWS, len(self)))
            values = block[: place.stop - first]
            if self._quantized is None:
                bits = values.view(np.int32)
                np.left_shift(self._bits[place], 13, out=bits, dtype=np.int32)
                np.bitwise_and(bits, SIGN_AND_BITS, out=bits)
                np.matmul(values, columns, out=result[place])
            else:
                numbers, scales = self._quantized
                values[:] = numbers[place]
                np.matmul(values, columns, out=result[place])
                result[place] *= scales[place, None]

    def _quantize(self) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """Rows as int8 (N, E), and the scale of each (N,)."""
        numbers = np.empty((len(self), self.dim), np.int8)
        scales = np.empty(len(self), np.float32)

        def quantize(start: int) -> None:
            for first in range(start, min(start + TASK_ROWS, len(self)), BLOCK_ROWS):
                place = slice(first, min(first + BLOCK_ROWS, len(self)))
                rows = self._bits[place].view(np.float16).astype(np.float32)
                scales[place] = np.abs(rows).max(1) / 127
                rows /= np.maximum(scales[place], np.float32(1e-9))[:, None]
                numbers[place] = np.rint(rows, out=rows)

        _in_threads(quantize, len(self))
        return numbers, scales


def _in_threads(work: Callable[[int], None], rows: int) -> None:
    """Call a function with the start of each task's rows, on all cores."""
    starts = range(0, rows, TASK_ROWS)
    with ThreadPoolExecutor(min(len(starts) or 1, os.cpu_count() or 1)) as pool:
        list(pool.map(work, starts))
