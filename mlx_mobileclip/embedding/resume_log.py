"""Log of the finished rows of a run, so that an interrupted run can be resumed.

Rows are appended batch by batch, each batch with a checksum. An incomplete or damaged tail, such
as a killed process leaves, is truncated when the file is opened again.
"""

import fcntl
import json
import os
import stat
import struct
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError

Key = tuple[str, str]
REMEDY = "remove the file, or choose another --output"
MAX_RECORD_BYTES = 256 << 20
ROWS_PER_RECORD = 256
# Magic, size in bytes of the keys (JSON) and of the rows (float32), CRC-32 of keys and rows.
RECORD = struct.Struct("<4sIII")
MAGIC = b"MCE1"


class ResumeLog:
    """Rows by key (name and stamp) in `<output>.partial`.

    A context manager that locks the file, where the file system supports locks.

    Attributes:
        path: The log file.
        metadata: Header of the log.
        rows: Embeddings, float32 (E,), by key.
    """

    def __init__(self, output: Path, metadata: Mapping[str, str]):
        """Set the path; the file is opened on entry.

        Args:
            output: File that the run will write.
            metadata: Metadata that all rows depend on, and `model`, the name of the model. A log
                that differs in anything but the name is refused on entry.
        """
        self.path = output.with_name(output.name + ".partial")
        self.metadata = dict(metadata)
        self.rows: dict[Key, NDArray[np.float32]] = {}
        self._file: BinaryIO

    def __enter__(self) -> "ResumeLog":
        try:
            self._file = os.fdopen(_open_safely(self.path), "a+b")
        except OSError as error:
            raise DataError(
                f"{self.path}: cannot be written ({error.strerror or error}); choose another "
                "--output"
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise DataError(
                f"{self.path}: another run is writing it; wait for it or choose another --output"
            ) from error
        except OSError:
            pass  # network file systems without locks
        try:
            self._file.seek(0, os.SEEK_END)
            if not self._file.tell():
                self._append(json.dumps(self.metadata).encode(), b"")
            self._file.seek(0)
            self._file.truncate(self._replay())
        except BaseException:
            with suppress(OSError):  # a full disk, already reported
                self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if not self.rows:  # nothing to resume
            self.remove()
        with suppress(OSError):  # a full disk, already reported
            self._file.close()

    def append(self, keys: Sequence[Key], rows: NDArray[np.float32]) -> None:
        """Add the rows of a batch; they survive a killed process once this returns.

        Args:
            keys: N keys.
            rows: Their embeddings (N, E).

        Raises:
            DataError: the file cannot be written, or its rows have another width.
        """
        first = next(iter(self.rows.values()), rows[0])
        if len(first) != rows.shape[1]:
            raise DataError(f"{self.path}: contains rows of another model; {REMEDY}")
        for i in range(0, len(keys), ROWS_PER_RECORD):
            some = slice(i, i + ROWS_PER_RECORD)
            self._append(json.dumps(keys[some]).encode(), rows[some].astype("<f4").tobytes())
        self.rows.update(zip(keys, rows, strict=True))

    def remove(self) -> None:
        """Delete the log once its rows are in the output; spares another file at its path."""
        with suppress(OSError):
            if os.path.samestat(self.path.lstat(), os.fstat(self._file.fileno())):
                self.path.unlink()

    def _replay(self) -> int:
        """Read the rows of an earlier run; returns the size of the intact part in bytes."""
        header = self._next_record()
        try:
            if header is None or not isinstance(metadata := json.loads(header[0]), dict):
                raise ValueError
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{self.path}: is damaged or not a log of this program; {REMEDY}"
            ) from error
        if metadata | {"model": ""} != self.metadata | {"model": ""}:
            made_with = f"{metadata.get('kind', '')}, model {metadata.get('model') or 'unnamed'}"
            raise DataError(
                f"{self.path}: belongs to an unfinished run with other weights, settings or "
                f"version ({made_with}); finish that run, {REMEDY}"
            )
        end = self._file.tell()
        while (record := self._next_record()) is not None:
            try:
                self.rows.update(_parse_record(*record))
            except (ValueError, TypeError, RecursionError) as error:
                raise DataError(f"{self.path}: is not a log of this program; {REMEDY}") from error
            end = self._file.tell()
        if len({row.shape for row in self.rows.values()}) > 1:
            raise DataError(f"{self.path}: contains rows of several models; {REMEDY}")
        return end

    def _next_record(self) -> tuple[bytes, bytes] | None:
        """Keys and rows of the next record; None at the end or if the record is damaged."""
        head = self._file.read(RECORD.size)
        if len(head) < RECORD.size:
            return None
        magic, keys_bytes, rows_bytes, checksum = RECORD.unpack(head)
        left = os.fstat(self._file.fileno()).st_size - self._file.tell()
        if magic != MAGIC or keys_bytes + rows_bytes > min(left, MAX_RECORD_BYTES):
            return None
        keys, rows = self._file.read(keys_bytes), self._file.read(rows_bytes)
        return (keys, rows) if zlib.crc32(rows, zlib.crc32(keys)) == checksum else None

    def _append(self, keys: bytes, rows: bytes) -> None:
        checksum = zlib.crc32(rows, zlib.crc32(keys))
        try:
            self._file.write(RECORD.pack(MAGIC, len(keys), len(rows), checksum) + keys + rows)
            self._file.flush()
        except OSError as error:
            raise DataError(
                f"{self.path}: cannot be written ({error.strerror}); free some space and run the "
                "same command again"
            ) from error


def _parse_record(keys: bytes, rows: bytes) -> dict[Key, NDArray[np.float32]]:
    """Rows of a record by key; raises ValueError or TypeError for a foreign record."""
    names = [(str(name), str(stamp)) for name, stamp in json.loads(keys)]
    matrix = np.frombuffer(rows, "<f4").reshape(len(names), -1)
    if not np.isfinite(matrix).all():
        raise ValueError("a value is not finite")
    return dict(zip(names, matrix, strict=True))


def _open_safely(path: Path) -> int:
    """Open the log, but refuse links, pipes and files of other users in its place."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(path, flags, 0o666)
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_uid == os.geteuid():
        return descriptor
    os.close(descriptor)
    raise OSError("must be a regular file that you own, with no other links")
