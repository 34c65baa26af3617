"""Where and when figures were taken, and how they are written down."""

import argparse
import importlib.metadata
import json
import os
import platform
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
    "pillow",
)


def surroundings() -> dict[str, Any]:
    """Machine, versions and date."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{_processor()}, {os.cpu_count()} cores, {_memory_gb()} GB",
        "system": platform.platform(),
        "blas": Path(os.environ.get("LD_PRELOAD", "")).name,
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"),
        "versions": {"python": platform.python_version()} | _versions(),
    }


def _processor() -> str:
    if sys.platform == "darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string")
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.machine()


def _memory_gb() -> int:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9)


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
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
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="also keep the record there")


def keep(tables: str, record: dict[str, Any], file: Path | None) -> None:
    """Print the tables with where they are from, and write the record if it is wanted."""
    where = surroundings()
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    blas = f", {where['blas']}" if where["blas"] else ""
    print(f"{tables}\n\n{where['date']}, {where['machine']}, {where['system']}: {versions}{blas}.")
    if file is not None:
        file.write_text(json.dumps(where | record, indent=1) + "\n")
