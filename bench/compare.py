"""Compare the speed of this package with its peers, on the same random weights.

Each contender runs in its own process, and they take turns, so that other load on the machine
affects all of them alike. Within a turn, short work is repeated for a second and the median taken.
Ratios are those of the medians over turns; their ranges are those of single turns.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx

from mlx_mobileclip.device import DTYPES, on_cpu, on_metal

from . import ROOT, cases, checkpoints
from .cases import Case
from .record import preload, table

OURS = "ours"
PAUSE_S = 0.5  # threads of PyTorch and OpenBLAS spin for a while after their work
INSTALL = {
    "mlx-vlm": "pip install mlx-vlm",
    "mlx-lm": "pip install .",
    "transformers": 'pip install ".[parity]"',
    "open_clip": 'pip install ".[parity]"',
    "onnxruntime": "pip install onnxruntime onnxscript",
    "openai-clip": 'pip install ".[parity]"',
    "llava-onevision": 'pip install ".[parity]"',
}


@dataclass(frozen=True, slots=True)
class Measured:
    """Results of a contender.

    Attributes:
        seconds: Duration of each turn.
        peak_bytes: Peak memory.
        work: "flops", "tokens" and "weights", see worker.py; for headline cases only.
    """

    seconds: list[float]
    peak_bytes: int
    work: dict[str, int] | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only",
        action="append",
        metavar="CASE",
        help="name of a case or its prefix; may be repeated",
    )
    parser.add_argument(
        "--scaling",
        action="store_true",
        help="measure how costs grow with the size of the work instead",
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--size", choices=("tiny", "0.5b"), default="0.5b")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32" if on_cpu() else "float16" if on_metal() else "bfloat16",
        help="default on this machine: %(default)s",
    )
    parser.add_argument(
        "--dir", type=Path, help="directory with 3 GB of free space for checkpoints"
    )


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    selected = cases.scaling(args.size) if args.scaling else cases.standard(args.size)
    if args.only:
        selected += cases.headline(args.size)
    selected = [replace(case, dtype=args.dtype, gpu=not on_cpu()) for case in selected]
    if args.only:
        names = ", ".join(case.name for case in selected)
        selected = [case for case in selected if case.name.startswith(tuple(args.only))]
        if not selected:
            raise SystemExit(f"no case starts with {' or '.join(args.only)}; choose from {names}")
    rows: list[list[str]] = []
    results: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    notes: list[str] = []
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=args.dir) as directory:
        for case in selected:
            print(f"{case.name} ...", file=sys.stderr, flush=True)
            try:
                checkpoint = checkpoints.write(case, Path(directory))
                measured = measure(case, checkpoint, args.repeats, absent)
            except KeyboardInterrupt:
                if not results:
                    raise
                notes.append(f"Interrupted at {case.name}.")
                break
            new_rows = list(_rows(case, measured))
            print("\n".join(" ".join(row) for row in new_rows), file=sys.stderr, flush=True)
            rows += new_rows
            taken = {name: asdict(figures) for name, figures in measured.items()}
            results.append(asdict(case) | {"measured": taken})
    header = ("case", "contender", "median, s", "range", "ours: times faster", "range", "peak, MB")
    tables = [table(header, rows)]
    if work_rows := [row for result in results for row in _work_rows(result)]:
        columns = ("case", "contender", "GFLOP", "prompt, tokens", "weights, MB")
        tables.append(table(columns, work_rows))
    notes += [f"{name} is left out: {why}" for name, why in absent.items()]
    device = mx.device_info().get("device_name", "") if not on_cpu() else "the CPU"
    notes.append(f"In {args.dtype}, on {device}.")
    notes.append(f"Load average before the run: {load:.1f}; an idle machine is below 0.5.")
    record = {"results": results, "absent": absent, "load_before": load, "device": device}
    return "\n\n".join([*tables, *notes]), record


def measure(
    case: Case, checkpoint: Path, repeats: int, absent: dict[str, str]
) -> dict[str, Measured]:
    """Let the contenders take turns; the first turn of each is a warm-up.

    Args:
        case: Work to measure.
        checkpoint: Path from `checkpoints.write`.
        repeats: Turns to measure.
        absent: Updated with contenders that cannot take part, and the reason.
    """
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker(name, case, checkpoint)) for name in case.contenders
        }
        for name in case.contenders:  # they load in parallel; wait until each is ready
            start = workers[name].receive()
            if "missing" in start:
                absent[name] = f"{start['missing']} is not installed; {INSTALL.get(name, '')}"
                del workers[name]
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        shuffle = random.Random(0)  # random order, so that no contender always follows another
        for _ in range(repeats + 1):
            for name in shuffle.sample(list(workers), len(workers)):
                time.sleep(PAUSE_S)
                answer = workers[name].ask("run")
                if answer:
                    seconds[name].append(answer["seconds"])
                elif name == OURS:
                    raise SystemExit(f"{case.name}: failed; see the error above")
                else:
                    absent[f"{name} at {case.name}"] = "it failed"
                    del workers[name]
        return {
            name: Measured(
                seconds[name][1:],
                worker.ask("peak")["bytes"],
                worker.ask("work") if case.is_headline else None,
            )
            for name, worker in workers.items()
        }


class Worker:
    """A contender's process; see worker.py."""

    def __init__(self, name: str, case: Case, checkpoint: Path):
        command = [sys.executable, "-m", "bench.worker", name, json.dumps(asdict(case))]
        self._process = subprocess.Popen(
            [*command, str(checkpoint)],
            cwd=ROOT,
            env=os.environ | {"LD_PRELOAD": preload()},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # only the parent handles Ctrl-C
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error:
            self._process.kill()
        self._process.communicate()

    def receive(self) -> dict[str, Any]:
        """Read the next answer; empty if the process has ended."""
        assert self._process.stdout
        return json.loads(self._process.stdout.readline() or "{}")

    def ask(self, request: str) -> dict[str, Any]:
        """Send a request and read the answer; empty if the process has ended."""
        assert self._process.stdin
        try:
            print(request, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            return {}
        return self.receive()


def _rows(case: Case, measured: dict[str, Measured]) -> Iterator[list[str]]:
    ours = measured[OURS].seconds
    for name, figures in measured.items():
        ratios = [theirs / own for theirs, own in zip(figures.seconds, ours, strict=True)]
        faster = median(figures.seconds) / median(ours)
        yield [
            case.name,
            name,
            f"{median(figures.seconds):.3g}",
            f"{min(figures.seconds):.3g} to {max(figures.seconds):.3g}",
            "" if name == OURS else f"{faster:.2f}",
            "" if name == OURS else f"{min(ratios):.2f} to {max(ratios):.2f}",
            f"{figures.peak_bytes / 1e6:.0f}",
        ]


def _work_rows(result: dict[str, Any]) -> Iterator[list[str]]:
    for name, figures in result["measured"].items():
        if work := figures["work"]:
            flops = f"{work['flops'] / 1e9:.0f}" if work["flops"] else "as in PyTorch"
            tokens = str(work["tokens"] or "")
            yield [result["name"], name, flops, tokens, f"{work['weights'] / 1e6:.0f}"]
