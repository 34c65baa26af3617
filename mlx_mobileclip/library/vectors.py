"""Vectors of the index: float16 in chunks of 1,024 rows, searched by brute force.

The first scan of a process converts float16 on the fly. The second quantises the rows to int8 with
a scale per row, so that this and later scans take a quarter of the time. Both give approximate
scores, which select candidates for exact scoring.
"""

import os
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError

CHUNK_ROWS = 1024
BLOCK_ROWS = 256  # per conversion: fits a core's cache
TASK_ROWS = 8192  # per task of a thread
MAX_DIM = 8192
# Shifting float16 bits to their float32 positions yields the value times 2^-112.
TO_FLOAT32 = np.float32(2.0**112)
SIGN_AND_VALUE_BITS = np.int32(-0x70002000)  # 0x8fffe000


def write_vectors(
    connection: sqlite3.Connection, slots: Sequence[int], rows: NDArray[np.float16]
) -> None:
    """Write rows (N, E) to their slots; new slots follow the last one without gaps."""
    dim = rows.shape[1]
    by_chunk: dict[int, list[int]] = {}
    for i, slot in enumerate(slots):
        by_chunk.setdefault(slot // CHUNK_ROWS, []).append(i)
    for chunk, indices in by_chunk.items():
        found = connection.execute("SELECT rows FROM vector WHERE chunk=?", (chunk,)).fetchone()
        old = np.frombuffer(found[0], np.float16).reshape(-1, dim) if found else rows[:0]
        offsets = np.array([slots[i] % CHUNK_ROWS for i in indices])
        new = np.zeros((max(len(old), offsets.max() + 1), dim), np.float16)
        new[: len(old)] = old
        new[offsets] = rows[indices]
        connection.execute("INSERT OR REPLACE INTO vector VALUES(?, ?)", (chunk, new.tobytes()))


def take_slots(connection: sqlite3.Connection, count: int) -> list[int]:
    """Allocate slots: freed ones first, then new ones at the end."""
    freed = connection.execute("SELECT slot FROM free_slot LIMIT ?", (count,)).fetchall()
    connection.executemany("DELETE FROM free_slot WHERE slot=?", freed)
    slots = [slot for (slot,) in freed]
    [last] = connection.execute("SELECT max(slot) FROM file").fetchone()
    [last_free] = connection.execute("SELECT max(slot) FROM free_slot").fetchone()
    end = max(-1 if last is None else last, -1 if last_free is None else last_free, *slots, -1) + 1
    return slots + list(range(end, end + count - len(slots)))


class Vectors:
    """All vectors of an index in memory: as stored, and from the second scan on also as int8."""

    def __init__(self, connection: sqlite3.Connection, dim: int):
        """Read the vectors, stored as float16.

        Raises:
            DataError: the dimension or the size of a chunk is invalid.
        """
        if not 1 <= dim <= MAX_DIM:
            raise DataError(f"the index has an invalid dimension {dim}; run index with --rebuild")
        self.dim = dim
        # Check sizes before reading, as a hostile blob may be large.
        sizes = connection.execute("SELECT chunk, length(rows) FROM vector ORDER BY chunk")
        counts = []
        for expected, (chunk, size) in enumerate(sizes.fetchall()):
            if chunk != expected or size % (2 * dim) or not 0 < size <= 2 * dim * CHUNK_ROWS:
                raise DataError(f"chunk {chunk} of the index is damaged; run index with --rebuild")
            counts.append(size // (2 * dim))
        if any(count != CHUNK_ROWS for count in counts[:-1]):
            raise DataError("a chunk of the index is damaged; run index with --rebuild")
        self._bits = np.empty((sum(counts), dim), np.int16)  # bits of float16
        for chunk, count in enumerate(counts):
            found = connection.execute("SELECT rows FROM vector WHERE chunk=?", (chunk,)).fetchone()
            if found is None or len(found[0]) < 2 * dim * count:
                raise DataError("the index has just been rebuilt; run the same command again")
            rows = np.frombuffer(found[0], "<i2", count * dim).reshape(count, dim)
            self._bits[chunk * CHUNK_ROWS :][:count] = rows
        connection.execute("PRAGMA shrink_memory")  # free SQLite's page cache
        self._quantized: tuple[NDArray[np.int8], NDArray[np.float32]] | None = None
        self._scans = 0

    def __len__(self) -> int:
        return len(self._bits)

    def scores(self, queries: NDArray[np.float32]) -> NDArray[np.float32]:
        """Cosine similarities of unit queries (Q, E) with all rows: float32 (Q, N).

        Accurate to about 0.002.
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
        """Rows in these slots, exactly as stored: float32 (N, E)."""
        bits = self._bits[np.asarray(slots, np.intp)]
        return bits.view(np.float16).astype(np.float32)

    def _score(self, start: int, columns: NDArray[np.float32], result: NDArray[np.float32]) -> None:
        """Score the rows of the task that begins at `start`, block by block."""
        block = np.empty((BLOCK_ROWS, self.dim), np.float32)
        for first in range(start, min(start + TASK_ROWS, len(self)), BLOCK_ROWS):
            span = slice(first, min(first + BLOCK_ROWS, start + TASK_ROWS, len(self)))
            values = block[: span.stop - first]
            if self._quantized is None:
                bits = values.view(np.int32)
                np.left_shift(self._bits[span], 13, out=bits, dtype=np.int32)
                np.bitwise_and(bits, SIGN_AND_VALUE_BITS, out=bits)
                np.matmul(values, columns, out=result[span])
            else:
                quantized, scales = self._quantized
                values[:] = quantized[span]
                np.matmul(values, columns, out=result[span])
                result[span] *= scales[span, None]

    def _quantize(self) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """Quantise rows to int8 (N, E) with a scale per row (N,)."""
        quantized = np.empty((len(self), self.dim), np.int8)
        scales = np.empty(len(self), np.float32)

        def quantize(start: int) -> None:
            for first in range(start, min(start + TASK_ROWS, len(self)), BLOCK_ROWS):
                span = slice(first, min(first + BLOCK_ROWS, len(self)))
                rows = self._bits[span].view(np.float16).astype(np.float32)
                scales[span] = np.abs(rows).max(1) / 127
                rows /= np.maximum(scales[span], np.float32(1e-9))[:, None]
                quantized[span] = np.rint(rows, out=rows)

        _in_threads(quantize, len(self))
        return quantized, scales


def _in_threads(task: Callable[[int], None], rows: int) -> None:
    """Run a function on all cores, called with the first row of each task."""
    starts = range(0, rows, TASK_ROWS)
    with ThreadPoolExecutor(min(len(starts) or 1, os.cpu_count() or 1)) as pool:
        list(pool.map(task, starts))
