"""Content hash, which identifies moved and copied files."""

import hashlib
import os
import stat

from ..preprocess.image import MAX_IMAGE_BYTES
from .scan import Stamp

HASH_BYTES = 16
BLOCK = 1 << 20


def file_hash(path: bytes, stamp: Stamp | None) -> bytes | None:
    """Hash a file's content to 16 bytes; None if it is unreadable or too large for an image."""
    if stamp is None or stamp.size > MAX_IMAGE_BYTES:
        return None
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    try:
        with open(path, "rb", opener=_open_nonblocking) as file:
            while block := file.read(BLOCK):
                digest.update(block)
    except OSError:
        return None
    return digest.digest()


def _open_nonblocking(path: str, flags: int) -> int:
    """Open a regular file without blocking, even if it has been replaced by a pipe."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(f"{path!r}: is not a file")
