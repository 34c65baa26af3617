"""Run hostile cases one after another in a subprocess, so that a crash is detected."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.worker import peak, reset_peak

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
MEMORY_LIMIT_BYTES = 6 << 30


@dataclass
class Outcome:
    """Result of one case; `grown_mb` is the growth of the process's peak memory."""

    status: int
    out: str = ""
    err: str = ""
    seconds: float = 0.0
    grown_mb: float = 0.0


def run(cases: Sequence[tuple[str, list[str]]], timeout_s: float = 120) -> list[Outcome]:
    """Run (kind, arguments) cases; one that kills the process has its return code as status."""
    outcomes: list[Outcome] = []
    while len(outcomes) < len(cases):
        remaining = json.dumps(cases[len(outcomes) :])
        command = [sys.executable, __file__]
        process = subprocess.run(
            command,
            input=remaining,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=ENVIRONMENT,
        )
        outcomes += [Outcome(**json.loads(line)) for line in process.stdout.splitlines()]
        if process.returncode:
            outcomes.append(Outcome(process.returncode, err=f"died: {process.stderr[-500:]}"))
    if record := os.environ.get("ATTACKS_RECORD"):  # set by `python -m bench attacks`
        with Path(record).open("a") as file:
            for (kind, arguments), outcome in zip(cases, outcomes, strict=True):
                message = re.sub(r"\S+/", "", outcome.err.partition(": ")[2])  # no directories
                label = message[:80].strip() or Path(arguments[0]).name
                costs = {"seconds": outcome.seconds, "grown_mb": outcome.grown_mb}
                file.write(json.dumps({"kind": kind, "what": label, **costs}) + "\n")
    return outcomes


def assert_refused(outcome: Outcome, reason: str, *, seconds: float = 10, megabytes: float = 700):
    """Assert status 1, empty stdout, a one-line error with the reason, and bounded cost."""
    assert outcome.status == 1, outcome
    assert outcome.out == ""
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome
    assert lines[0].startswith("error: "), outcome
    assert lines[0].isprintable()
    assert len(lines[0]) < 5000
    assert "--debug" not in lines[0], outcome  # suggested only for unexpected exceptions
    assert reason in lines[0]
    assert outcome.seconds < seconds, outcome
    assert outcome.grown_mb < megabytes, outcome


def assert_done(outcome: Outcome) -> None:
    """Assert exit status 0 and an empty stderr."""
    assert outcome.status == 0, outcome
    assert outcome.err == ""


def _answer(arguments: list[str]) -> int:
    from mlx_fastvlm.cli.generate import main

    return main([*arguments, "--quiet"])


def _convert(arguments: list[str]) -> int:
    from convert.__main__ import main

    return main([*arguments, "--quiet"])


def _image(arguments: list[str]) -> int:
    """Preprocess an image (arguments: path, mode) and print the colour of its centre."""
    from mlx_mobileclip.preprocess.image import open_image, resize_crop, resize_pad, to_array
    from mlx_mobileclip.terminal import run_command

    def show() -> None:
        resize = {"pad": resize_pad, "crop": resize_crop}[arguments[1]]
        pixels = to_array(resize(open_image(arguments[0]), 256))
        assert pixels.shape == (256, 256, 3)
        assert 0 <= pixels.min() <= pixels.max() <= 1
        print(*(pixels[128, 128] * 255).round().astype(int))

    return run_command(show, debug=False)


KINDS = {"answer": _answer, "convert": _convert, "image": _image}


def _run_cases() -> None:
    if sys.platform == "linux":  # macOS accepts the limit and does not enforce it
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    report: Any = sys.stdout
    for kind, arguments in json.load(sys.stdin):
        out, err = io.StringIO(), io.StringIO()
        reset_peak()
        started, before = time.perf_counter(), peak()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = KINDS[kind](arguments)
        outcome = Outcome(
            status,
            out.getvalue(),
            err.getvalue(),
            time.perf_counter() - started,
            (peak() - before) / 1e6,
        )
        print(json.dumps(asdict(outcome)), file=report, flush=True)


if __name__ == "__main__":
    _run_cases()
