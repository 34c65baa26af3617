"""Measure time and memory of hostile files, and what killed commands leave behind.

Runs every attack of tests/security, and kills conversions and embedding runs at random moments.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from convert.calibration import drawn_images

from . import ROOT
from .record import table

IMAGES = 48
WORST = 3  # attacks shown per kind and measure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kills",
        type=int,
        default=100,
        metavar="N",
        help="how often to kill each command (default: 100)",
    )


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        outcomes = attack(directory / "outcomes.jsonl")
        kills = {
            "convert": kill_conversions(directory, args.kills),
            "embed": kill_embedding(directory, args.kills),
        }
    rows = [
        [kind, *row]
        for kind in sorted({outcome["kind"] for outcome in outcomes})
        for row in _worst([o for o in outcomes if o["kind"] == kind])
    ]
    costs = table(["what is attacked", "attacks", "seconds", "MB", "by"], rows)
    losses = table(["command", "killed", "damaged or lost"], [[k, *v] for k, v in kills.items()])
    return f"{costs}\n\n{losses}", {"attacks": outcomes, "kills": kills}


def attack(file: Path) -> list[dict[str, Any]]:
    """Time and memory of every attack that tests/security runs in a separate process."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/security"]
    environment = os.environ | {"ATTACKS_RECORD": str(file)}
    subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr, check=True)
    return [json.loads(line) for line in file.read_text().splitlines()]


def _worst(outcomes: list[dict[str, Any]]) -> Iterator[tuple[object, ...]]:
    """Rows of the table: the slowest attacks, and those that take the most memory."""
    worst: dict[int, None] = {}
    for measure in ("seconds", "grown_mb"):
        order = sorted(range(len(outcomes)), key=lambda i: -outcomes[i][measure])
        worst |= dict.fromkeys(order[:WORST])
    for outcome in (outcomes[i] for i in worst):
        seconds, megabytes = f"{outcome['seconds']:.2f}", f"{outcome['grown_mb']:.0f}"
        yield len(outcomes), seconds, megabytes, outcome["what"]


def kill_conversions(directory: Path, kills: int) -> tuple[int, int]:
    """Number of conversions killed, and number of incomplete outputs."""
    target, whole = directory / "converted", directory / "whole"
    command = ["-m", "convert", "--model", "demo", "--quiet", "--mlx-path"]
    started = time.monotonic()
    subprocess.run([sys.executable, *command, str(whole)], cwd=ROOT, check=True)
    seconds, expected = time.monotonic() - started, _weights(whole)
    killed = damaged = 0
    rng = random.Random(0)
    while killed < kills:
        if _kill_after(rng.uniform(0, 1.2 * seconds), [*command, str(target)]):
            killed += 1
        damaged += target.exists() and _weights(target) != expected
        shutil.rmtree(target, ignore_errors=True)
    subprocess.run([sys.executable, *command, str(target)], cwd=ROOT, check=True)
    return killed, damaged + (_weights(target) != expected)


def _weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


def kill_embedding(directory: Path, kills: int) -> tuple[int, int]:
    """Number of embedding runs killed, and number of wrong outputs; each run resumes the last."""
    pictures, output = directory / "pictures", directory / "embedded.npz"
    pictures.mkdir()
    for i, image in enumerate(drawn_images(IMAGES)):
        image.save(pictures / f"{i:03}.png")
    command = ["-m", "mlx_mobileclip", "embed", "--model", "demo", "--images", str(pictures)]
    command += ["--batch-size", "2", "--quiet", "--output", str(output)]
    started = time.monotonic()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    seconds, expected = time.monotonic() - started, _rows(output)
    output.unlink()
    killed = damaged = 0
    rng = random.Random(1)
    while killed < kills:
        if _kill_after(rng.uniform(0, 1.2 * seconds), command):
            killed += 1
        if output.exists():
            damaged += not np.allclose(_rows(output), expected, atol=1e-6)
            output.unlink()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    return killed, damaged + (not np.allclose(_rows(output), expected, atol=1e-6))


def _rows(output: Path) -> Any:
    with np.load(output) as stored:
        return stored["embeddings"]


def _kill_after(seconds: float, arguments: list[str]) -> bool:
    """Start a command and kill it; returns whether it was still running."""
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stderr=subprocess.PIPE)
    try:
        _, error = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return True
    if process.returncode:
        raise RuntimeError(f"a command that was not killed failed: {error.decode()[-500:]}")
    return False
