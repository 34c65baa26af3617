"""Settings of the whole process that speed up MLX's CPU backend.

Unnecessary once MLX's CPU backend reuses freed memory, as its GPU backends do, and agrees with BLAS
on who starts threads.
"""

import ctypes
import os
import platform
from functools import cache

from ..device import on_cpu

SWITCH = "MLX_MOBILECLIP_PROCESS_SETTINGS"  # "0" leaves the process as it is
# Options of glibc's mallopt, from malloc.h.
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4
KEPT_BYTES = 1 << 30
GROWTH_BYTES = 1 << 26


def configure() -> None:
    """Change how the process allocates memory and multiplies matrices; nothing on a GPU.

    glibc keeps about 1 GiB of freed memory for the next image. By default it returns large arrays
    to the system and the next ones are mapped and zeroed page by page, which takes a sixth of the
    time of a pass through FastViTHD (AMD EPYC, two cores, MLX 0.32.4, 2026-11-23).

    OpenBLAS, if it is the process's BLAS, starts no threads of its own: they would compete with
    those of the executor.

    Setting $MLX_MOBILECLIP_PROCESS_SETTINGS to 0 turns both off.
    """
    if on_cpu() and os.environ.get(SWITCH) != "0":
        _configure_once()


@cache
def _configure_once() -> None:
    library = ctypes.CDLL(None)
    if platform.libc_ver()[0] == "glibc":
        library.mallopt(MMAP_MAX, 0)  # large arrays too come from the heap
        library.mallopt(TRIM_THRESHOLD, KEPT_BYTES)
        library.mallopt(TOP_PAD, GROWTH_BYTES)
    set_threads = getattr(library, "openblas_set_num_threads", None)
    if set_threads is not None:
        set_threads(1)
