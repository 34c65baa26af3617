"""Record figures with machine, versions and date."""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import ROOT

PACKAGES = (
    "mlx",
    "mlx-lm",
    "mlx-vlm",
    "torch",
    "transformers",
    "timm",
    "open_clip_torch",
    "onnxruntime",
    "pillow",
)
# Prefixes of environment variables that affect speed.
SETTINGS = ("MALLOC_", "MLX_", "OMP_", "OPENBLAS_")


def machine_info() -> dict[str, Any]:
    """Machine, settings, versions and date."""
    return {
        "date": _today(),
        "machine": f"{_processor()}, {os.cpu_count()} cores, {_memory_gb()} GB",
        "system": platform.platform(),
        "blas": Path(preload()).resolve().name,
        "blas_kernel": blas_kernel(),
        "environment": {k: v for k, v in os.environ.items() if k.startswith(SETTINGS)},
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"),
        "versions": {"python": platform.python_version()} | _versions(),
    }


def _today() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d")


def preload() -> str:
    """BLAS to preload: Debian's OpenBLAS if installed, because the one in MLX's wheel is slow."""
    found = sorted(Path("/usr/lib").glob("*/openblas-pthread/libopenblas.so.0"))
    return os.environ.get("LD_PRELOAD", str(found[0]) if found else "")


def blas_kernel() -> str:
    """Name of the kernel that OpenBLAS selects here; empty without OpenBLAS.

    OPENBLAS_CORETYPE in the environment overrides its choice; then both are named.
    """
    kernel = _blas_kernel(dict(os.environ))
    forced = os.environ.get("OPENBLAS_CORETYPE")
    if not kernel or not forced:
        return kernel
    chosen = _blas_kernel({k: v for k, v in os.environ.items() if k != "OPENBLAS_CORETYPE"})
    return f"{kernel} by OPENBLAS_CORETYPE={forced}, {chosen} without it"


def _blas_kernel(environment: dict[str, str]) -> str:
    """The kernel's name, asked for in a process of its own, since it is chosen at loading."""
    code = (
        "import ctypes, sys; name = ctypes.CDLL(sys.argv[1]).openblas_get_corename; "
        "name.restype = ctypes.c_char_p; print(name().decode())"
    )
    command = [sys.executable, "-c", code, preload()]
    environment = {k: v for k, v in environment.items() if k != "LD_PRELOAD"}
    return _output(*command, env=environment) if preload() else ""


def _processor() -> str:
    if sys.platform == "darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string")
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.machine()


def _memory_gb() -> int:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9)


def _output(*command: str, env: dict[str, str] | None = None) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def add_record_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--record",
        type=Path,
        metavar="FILE.json",
        help="write the record to FILE.json, and the tables to FILE.md beside it",
    )


def record_file(command: str) -> Path:
    """Default path of a record of this machine and day."""
    machine = "-".join(re.findall(r"\w+", _processor().lower()))
    return ROOT / "bench" / "results" / f"{command}-{machine}-{_today()}.json"


def write_report(
    tables: str, record: dict[str, Any], machine: dict[str, Any], file: Path | None
) -> None:
    """Print the tables and their origin; write them and the record if a file is given."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    blas = f", {machine['blas']} ({machine['blas_kernel']})" if machine["blas"] else ""
    settings = "".join(f", {name}={value}" for name, value in machine["environment"].items())
    origin = (
        f"{machine['date']}, {machine['machine']}, {machine['system']}: {versions}{blas}{settings}."
    )
    text = f"{tables}\n\n{origin}"
    print(text)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(machine | record, indent=1) + "\n")
        file.with_suffix(".md").write_text(text + "\n")
        print(f"wrote {file} and {file.with_suffix('.md').name}", file=sys.stderr)
