"""Process-wide settings that speed up MLX's CPU backend.

Unnecessary once MLX's CPU backend reuses freed memory, as its GPU backends do, and shares threads
with BLAS.
"""

import ctypes
import os
import platform
import re
import sys
from functools import cache
from pathlib import Path

from ..device import on_cpu

SETTINGS_VARIABLE = "MLX_MOBILECLIP_PROCESS_SETTINGS"  # "0" leaves the process as it is
# Options of glibc's mallopt, from malloc.h.
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4
KEPT_BYTES = 1 << 30  # freed memory to keep
GROWTH_BYTES = 1 << 26  # step in which the heap grows
# Symbols of the process if a fast BLAS is preloaded, and path of the slow reference BLAS: in MLX's
# wheel, or in Debian's directory for it.
FAST_BLAS = ("openblas_set_num_threads", "MKL_Set_Num_Threads", "bli_thread_set_num_threads")
SLOW_BLAS_FILE = re.compile(r"/(mlx\w*\.libs|blas)/libblas[^/]*$", re.MULTILINE)


def configure() -> None:
    """Configure memory allocation and BLAS of the process; does nothing on a GPU.

    glibc keeps about 1 GiB of freed memory for the next image. By default it returns large arrays
    to the system, and mapping and zeroing new pages takes a sixth of the time of a forward pass of
    FastViTHD (AMD EPYC, two cores, MLX 0.32.4, 2026-11-23).

    OpenBLAS, if used, is limited to one thread, as its threads would compete with the executor's.

    Setting $MLX_MOBILECLIP_PROCESS_SETTINGS to 0 turns both off.
    """
    if on_cpu() and os.environ.get(SETTINGS_VARIABLE) != "0":
        _configure_once()


@cache
def _configure_once() -> None:
    library = ctypes.CDLL(None)
    if platform.libc_ver()[0] == "glibc":
        library.mallopt(MMAP_MAX, 0)  # large arrays come from the heap, too
        library.mallopt(TRIM_THRESHOLD, KEPT_BYTES)
        library.mallopt(TOP_PAD, GROWTH_BYTES)
    set_threads = getattr(library, "openblas_set_num_threads", None)
    if set_threads is not None:
        set_threads(1)


def slow_blas_remedy() -> str:
    """Advice if MLX uses a slow BLAS; empty otherwise.

    On Linux without a GPU, MLX's wheel includes the reference BLAS, which has a tenth of the
    speed of others.
    """
    if sys.platform != "linux" or not on_cpu():
        return ""
    library = ctypes.CDLL(None)
    try:
        loaded = Path("/proc/self/maps").read_text(errors="replace")
    except OSError:
        return ""
    if any(hasattr(library, name) for name in FAST_BLAS) or not SLOW_BLAS_FILE.search(loaded):
        return ""
    return (
        "MLX is running at a tenth of its speed without a fast BLAS; install OpenBLAS "
        "(Debian: libopenblas0-pthread) and set LD_PRELOAD=libopenblas.so.0"
    )
