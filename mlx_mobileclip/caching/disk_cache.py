"""Cache of matrices on disk, keyed by a hash of their inputs.

A cache must do no harm: an entry that is damaged, renamed or of the wrong size counts as absent,
a directory that cannot be written means no caching, and other files are neither read nor removed.
A directory that others can write to is not trusted, because they could write a valid digest too.
"""

import hashlib
import os
import stat
import struct
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import get_ident

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelError
from ..json_fields import read_bounded

SUFFIX = ".matrix"
PARTIAL = ".matrix-partial"
MAX_ENTRY_BYTES = 256 << 20
STALE_SECONDS = 3600  # a partial entry this old was left by a killed run
# Layout of an entry: SHA-256 digest, header, values.
DIGEST_BYTES = 32
HEADER = struct.Struct("<8sQQ")  # dtype, rows, columns
DTYPE = b"float32"
UNIT_TOLERANCE = 1e-3  # deviation of a row's norm from 1
CREATE_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL


@dataclass(frozen=True, slots=True)
class DiskCache:
    """A directory of matrices with a size limit; the least recently used are evicted.

    Attributes:
        directory: Created on the first write.
        max_bytes: Limit on the total size of all entries.
    """

    directory: Path
    max_bytes: int = 512 << 20

    def read(
        self, key: str, rows: int, columns: int, *, unit: bool = False
    ) -> NDArray[np.float32] | None:
        """Return the matrix stored under a key, or None.

        Args:
            key: Hexadecimal name of the entry.
            rows: Expected number of rows.
            columns: Expected number of columns.
            unit: Require rows of unit length.

        Returns:
            float32 (rows, columns), finite, or None if there is no valid entry.
        """
        path = self._path(key)
        try:
            if not self._is_trusted() or not _only_owner_writes(path.stat()):
                return None
            data = read_bounded(path, MAX_ENTRY_BYTES)
        except (OSError, ModelError):
            return None
        with suppress(OSError):  # on a read-only file system
            os.utime(path)  # for the eviction by last use
        body = data[DIGEST_BYTES:]
        header = HEADER.pack(DTYPE, rows, columns)
        if data[:DIGEST_BYTES] != _digest(key, body) or not body.startswith(header):
            return None
        if len(body) != len(header) + 4 * rows * columns:
            return None
        values = np.frombuffer(body, "<f4", offset=len(header))
        matrix = values.reshape(rows, columns).astype(np.float32)
        if not np.isfinite(matrix).all():
            return None
        if unit and np.abs(np.linalg.norm(matrix, axis=1) - 1).max() > UNIT_TOLERANCE:
            return None
        return matrix

    def write(self, key: str, matrix: NDArray[np.float32]) -> None:
        """Store a matrix under a key, then evict the least recently used entries."""
        body = HEADER.pack(DTYPE, *matrix.shape) + matrix.astype("<f4").tobytes()
        if len(body) + DIGEST_BYTES > MAX_ENTRY_BYTES:
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not self._is_trusted():
                return
            partial = self.directory / f"{key}-{os.getpid()}-{get_ident()}{PARTIAL}"
            try:
                with os.fdopen(os.open(partial, CREATE_NEW, 0o600), "wb") as file:
                    file.write(_digest(key, body) + body)
                partial.replace(self._path(key))
            finally:
                partial.unlink(missing_ok=True)
            self._prune()
        except OSError:
            return

    def _is_trusted(self) -> bool:
        """Whether others cannot change files in the directory; warns once if they can.

        Raises:
            OSError: the directory cannot be read.
        """
        status = self.directory.stat()
        if _only_owner_writes(status) or (
            status.st_uid == os.geteuid() and status.st_mode & stat.S_ISVTX
        ):
            return True
        if self.directory not in _warned:
            _warned.add(self.directory)
            remedy = "restrict it to yourself (chown, chmod go-w) or choose another"
            warnings.warn(
                f"{self.directory}: not used as a cache because others can write to it; {remedy}",
                stacklevel=2,
            )
        return False

    def _path(self, key: str) -> Path:
        return self.directory / f"{key}{SUFFIX}"

    def _prune(self) -> None:
        entries = [
            (path.stat(), path)
            for path in self.directory.iterdir()
            if path.suffix in (SUFFIX, PARTIAL) and path.is_file()
        ]
        total = 0
        for status, path in sorted(entries, key=lambda entry: -entry[0].st_mtime):
            if path.suffix == PARTIAL:
                if time.time() - status.st_mtime > STALE_SECONDS:
                    path.unlink(missing_ok=True)
                continue
            total += status.st_size
            if total > self.max_bytes:
                path.unlink(missing_ok=True)


_warned: set[Path] = set()


def _only_owner_writes(status: os.stat_result) -> bool:
    """Whether the user owns a file or directory, and nobody else can write to it."""
    if os.name != "posix":
        return True
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _digest(key: str, body: bytes) -> bytes:
    return hashlib.sha256(key.encode() + body).digest()
