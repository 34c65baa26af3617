"""Text matrices kept on disk between runs, named by the content that they follow from.

A cache must never be able to hurt: an entry that is damaged, renamed or of the wrong size counts
as absent, and a directory that cannot be written means no caching.
"""

import hashlib
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MAX_ENTRY_BYTES = 256 << 20
MAX_TOTAL_BYTES = 512 << 20
STALE_SECONDS = 3600  # a temporary file this old was left by a run that was killed
DIGEST_BYTES = 32


def directory() -> Path:
    """Where entries lie: $MLX_MOBILECLIP_CACHE, or mlx-mobileclip in the user's cache."""
    if chosen := os.environ.get("MLX_MOBILECLIP_CACHE"):
        return Path(chosen).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "mlx-mobileclip"


def read(key: str, rows: int) -> NDArray[np.float32] | None:
    """The matrix stored under a key, or None.

    Args:
        key: Name of the entry, hexadecimal.
        rows: How many rows it must have.

    Returns:
        float32 (rows, E), or None if there is no sound entry.
    """
    path = directory() / key
    try:
        with path.open("rb") as file:
            data = file.read(MAX_ENTRY_BYTES + 1)
        os.utime(path)  # recently used entries survive the longest
    except OSError:
        return None
    body = data[DIGEST_BYTES:]
    if data[:DIGEST_BYTES] != _digest(key, body) or not body or len(body) % (4 * rows):
        return None
    return np.frombuffer(body, "<f4").reshape(rows, -1).astype(np.float32)


def write(key: str, matrix: NDArray[np.float32]) -> None:
    """Store a matrix under a key, then drop the entries not used for longest."""
    body = matrix.astype("<f4").tobytes()
    if len(body) + DIGEST_BYTES > MAX_ENTRY_BYTES:
        return
    try:
        directory().mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, partial = tempfile.mkstemp(suffix=".tmp", dir=directory())
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_digest(key, body) + body)
            Path(partial).replace(directory() / key)
        finally:
            Path(partial).unlink(missing_ok=True)
        _prune()
    except OSError:
        return


def _digest(key: str, body: bytes) -> bytes:
    return hashlib.sha256(key.encode() + body).digest()


def _prune() -> None:
    found = [(path.stat(), path) for path in directory().iterdir() if path.is_file()]
    total = 0
    for status, path in sorted(found, key=lambda entry: -entry[0].st_mtime):
        if path.suffix == ".tmp":
            if time.time() - status.st_mtime > STALE_SECONDS:
                path.unlink(missing_ok=True)
            continue
        total += status.st_size
        if total > MAX_TOTAL_BYTES:
            path.unlink(missing_ok=True)
