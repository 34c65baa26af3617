"""Hash of a file's content, by which moved and copied files are recognised."""

import hashlib
import os
import stat

from ..preprocess.image import MAX_IMAGE_BYTES
from .scan import Stamp

HASH_BYTES = 16
BLOCK = 1 << 20


def file_hash(path: bytes, stamp: Stamp | None) -> bytes | None:
    """Hash of a file's content, 16 bytes; None if it cannot be read, or is too large to be one."""
    if stamp is None or stamp.size > MAX_IMAGE_BYTES:
        return None
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            while block := file.read(BLOCK):
                digest.update(block)
    except OSError:
        return None
    return digest.digest()


def _open_without_waiting(path: str, flags: int) -> int:
    """Open a file that may have become a pipe meanwhile, on which `open` would wait for ever."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(f"{path!r}: is not a file")
