"""The finished rows of a run that has not ended, so that an interrupted run can be resumed.

Rows are appended batch by batch, each batch with a checksum. An incomplete or damaged tail, as a
killed process leaves it, is truncated when the file is opened again.
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
REMEDY = "remove it, or choose another --output"
MAX_RECORD_BYTES = 256 << 20
ROWS_PER_RECORD = 256
# Magic, lengths in bytes of the keys (JSON) and of the rows (float32), CRC of keys and rows.
RECORD = struct.Struct("<4sIII")
MAGIC = b"MCE1"


class ResumeLog:
    """Rows by key (name and stamp) in `<output>.partial`.

    A context manager that holds a lock on the file, where the file system has locks.

    Attributes:
        path: The log file.
        about: The header.
        rows: Embeddings, float32 (E,), by key.
    """

    def __init__(self, output: Path, about: Mapping[str, str]):
        """Choose the file; it is opened on entry.

        Args:
            output: The file that the run will write.
            about: What all rows depend on, and `model`, the model's name. A log in which anything
                but the name differs is refused on entry.
        """
        self.path = output.with_name(output.name + ".partial")
        self.about = dict(about)
        self.rows: dict[Key, NDArray[np.float32]] = {}
        self._file: BinaryIO

    def __enter__(self) -> "ResumeLog":
        try:
            self._file = os.fdopen(_open_ours(self.path), "a+b")
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
                f"{self.path}: another run is writing it; wait for that, or choose another --output"
            ) from error
        except OSError:
            pass  # network file systems without locks
        try:
            self._file.seek(0, os.SEEK_END)
            if not self._file.tell():
                self._append(json.dumps(self.about).encode(), b"")
            self._file.seek(0)
            self._file.truncate(self._replay())
        except BaseException:
            with suppress(OSError):  # a full disk, told already
                self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if not self.rows:  # nothing to go on from
            self.remove()
        with suppress(OSError):  # a full disk, told already
            self._file.close()

    def append(self, keys: Sequence[Key], rows: NDArray[np.float32]) -> None:
        """Add the rows of a batch; they survive a killed process once this returns.

        Args:
            keys: N keys.
            rows: Their embeddings (N, E).

        Raises:
            DataError: the file cannot be written, or its rows are of another width.
        """
        known = next(iter(self.rows.values()), rows[0])
        if len(known) != rows.shape[1]:
            raise DataError(f"{self.path}: holds rows of another model; {REMEDY}")
        for i in range(0, len(keys), ROWS_PER_RECORD):
            some = slice(i, i + ROWS_PER_RECORD)
            self._append(json.dumps(keys[some]).encode(), rows[some].astype("<f4").tobytes())
        self.rows.update(zip(keys, rows, strict=True))

    def remove(self) -> None:
        """Delete the file, once its rows are in the output; not another of its name."""
        with suppress(OSError):
            if os.path.samestat(self.path.lstat(), os.fstat(self._file.fileno())):
                self.path.unlink()

    def _replay(self) -> int:
        """Read the rows of an earlier run; returns the length of the intact part in bytes."""
        header = self._next()
        try:
            if header is None or not isinstance(about := json.loads(header[0]), dict):
                raise ValueError
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{self.path}: is damaged, or no file of this program; {REMEDY}"
            ) from error
        if about | {"model": ""} != self.about | {"model": ""}:
            made_by = f"{about.get('kind', '')} and model {about.get('model') or 'without a name'}"
            raise DataError(
                f"{self.path}: is of an unfinished run with other weights, settings or version "
                f"({made_by}); run that one again, {REMEDY}"
            )
        end = self._file.tell()
        while (record := self._next()) is not None:
            try:
                self.rows.update(_rows_of(*record))
            except (ValueError, TypeError, RecursionError) as error:
                raise DataError(f"{self.path}: is no file of this program; {REMEDY}") from error
            end = self._file.tell()
        if len({row.shape for row in self.rows.values()}) > 1:
            raise DataError(f"{self.path}: holds rows of several models; {REMEDY}")
        return end

    def _next(self) -> tuple[bytes, bytes] | None:
        """The keys and rows of the next record; None at the end or if it is damaged."""
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


def _rows_of(keys: bytes, rows: bytes) -> dict[Key, NDArray[np.float32]]:
    """The rows of a record by key; ValueError or TypeError if it is none of ours."""
    names = [(str(name), str(stamp)) for name, stamp in json.loads(keys)]
    matrix = np.frombuffer(rows, "<f4").reshape(len(names), -1)
    if not np.isfinite(matrix).all():
        raise ValueError("a value is not finite")
    return dict(zip(names, matrix, strict=True))


def _open_ours(path: Path) -> int:
    """Open the log, but nothing that another has put in its place: a link, a pipe, their file."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(path, flags, 0o666)
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_uid == os.geteuid():
        return descriptor
    os.close(descriptor)
    raise OSError("is not a regular file of yours alone")
