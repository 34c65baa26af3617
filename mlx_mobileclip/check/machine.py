"""Describe the machine, and find versions known to be wrong and memory that is too small."""

import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from .. import __version__
from ..device import backend, memory_bytes

MIN_MLX = (0, 32, 4)
MIN_GENERATION = 5  # of Apple chips with matrix units: M5
MIN_MACOS = (26, 2)  # for matrix units
# Memory for an image of 1024 px besides the weights, estimated from the buffers in flight.
ACTIVATION_BYTES = 900_000_000
USABLE_SHARE = 2 / 3  # of all memory; the limit for GPUs that macOS recommends below 36 GB


@dataclass(frozen=True, slots=True)
class Machine:
    """Hardware and software that results depend on.

    Attributes:
        device: Name of MLX's default device.
        backend: "metal", "cuda" or "cpu".
        memory_bytes: All memory of the machine, or of a separate GPU.
        free_bytes: Available memory; None if unknown.
        mlx: Version of MLX.
        package: Version of this package.
        python: Version of Python.
        system: Operating system and its version.
        macos: Version of macOS; empty on other systems.
        tf32: Whether products of float32 are computed with ten bits of mantissa (TF32).
    """

    device: str
    backend: str
    memory_bytes: int
    free_bytes: int | None
    mlx: str
    package: str
    python: str
    system: str
    macos: str
    tf32: bool


class Finding(NamedTuple):
    """A problem of the machine.

    Attributes:
        wrong: Whether it makes results wrong; otherwise it is only a note.
        text: What, why, and what to do, in one line.
    """

    wrong: bool
    text: str


def this_machine() -> Machine:
    """Describe this machine."""
    info, kind = mx.device_info(), backend()
    device = str(info.get("device_name", "unknown"))
    matrix_units = kind == "cuda" or _generation(device) >= MIN_GENERATION
    return Machine(
        device=device,
        backend=kind,
        memory_bytes=memory_bytes() or _all_memory(),
        free_bytes=_free_memory(),
        mlx=mx.__version__,  # type: ignore[attr-defined]
        package=__version__,
        python=platform.python_version(),
        system=platform.platform(),
        macos=platform.mac_ver()[0],
        tf32=kind != "cpu" and matrix_units and os.environ.get("MLX_ENABLE_TF32") != "0",
    )


def findings(machine: Machine, dtype: mx.Dtype, weight_bytes: int) -> list[Finding]:
    """Find known problems of a machine: wrong versions, too little memory.

    Args:
        machine: From `this_machine`.
        dtype: dtype of the computation.
        weight_bytes: Size of the model's weights.
    """
    found = []
    if _parse_version(machine.mlx) < MIN_MLX:
        found.append(
            Finding(
                True,
                f"mlx {machine.mlx}: 0.32.0 reads wrong scales of nvfp4 and its threads race for "
                "kernels, and no version before 0.32.4 was tested; pip install -U mlx",
            )
        )
    old_system = machine.macos and _parse_version(machine.macos) < MIN_MACOS
    if _generation(machine.device) >= MIN_GENERATION and old_system:
        found.append(
            Finding(
                True,
                f"macOS {machine.macos} on {machine.device}: MLX uses matrix units that need "
                "macOS 26.2; update macOS",
            )
        )
    if machine.macos and machine.backend == "cpu":
        found.append(
            Finding(
                False,
                "MLX computes on the CPU, which is slow; use a Python for arm64, outside virtual "
                "machines",
            )
        )
    if dtype == mx.float32 and machine.tf32:
        found.append(
            Finding(
                False,
                "products of float32 are rounded to TF32 here; for exact ones set "
                "MLX_ENABLE_TF32=0",
            )
        )
    needed, usable = weight_bytes + ACTIVATION_BYTES, machine.memory_bytes * USABLE_SHARE
    if needed > usable:
        found.append(
            Finding(
                False,
                f"the model needs about {needed / 1e9:.1f} GB and the device may use "
                f"{usable / 1e9:.1f}; close other programs, or use fewer bits or a smaller model",
            )
        )
    return found


def _generation(device: str) -> int:
    """Generation of an Apple chip, such as 5 for every M5; 0 for other devices."""
    match = re.search(r"Apple M(\d+)", device)
    return int(match[1]) if match else 0


def _parse_version(version: str) -> tuple[int, ...]:
    """Parse a version, such as (0, 32, 4), for comparison."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _all_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _free_memory() -> int | None:
    """Bytes that are free or used as file cache; None if unknown."""
    try:
        if sys.platform == "darwin":
            text = subprocess.run(["/usr/bin/vm_stat"], capture_output=True, text=True).stdout
            page = re.search(r"page size of (\d+) bytes", text)
            pages = re.findall(r"Pages (?:free|inactive|speculative): +(\d+)", text)
            return int(page[1]) * sum(map(int, pages)) if page else None
        available = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
        return int(available[1]) * 1024 if available else None
    except OSError:
        return None
