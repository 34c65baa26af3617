"""Test and time the GPU code paths on an NVIDIA GPU: `python -m bench.cuda`.

Takes ten minutes: tests of the depthwise kernel, its time compared with MLX's, error and peak
memory of towers in half precision, compared with PyTorch if it is installed, and a breakdown of
the time to the first token. Failing parts are reported, and the others still run. Writes JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # read once, when MLX first computes

import mlx.core as mx

import mlx_fastvlm
from mlx_mobileclip.gpu import depthwise
from mlx_mobileclip.models import fastvit

from . import ROOT, cases, checkpoints, inputs
from .record import machine_info, table
from .rounding import random_tower

REPEATS = 10
Rows = Iterator[tuple[str, str, float, str]]  # measurement, variant, value, unit
# Each contender runs in its own process of bench.worker.
PEAKS = (
    cases.Case("vision", "vision", dtype="bfloat16", gpu=True),
    *(cases.Case(f"{v}-32", "image", ("ours", "open_clip"), batch=32, variant=cases.VARIANTS[v],
                 dtype="bfloat16", gpu=True) for v in ("s2", "b")),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", choices=PARTS, help="may be repeated")
    parser.add_argument("--record", type=Path, default=Path("cuda.json"), metavar="FILE")
    args = parser.parse_args()
    if mx.default_device() != mx.Device(mx.gpu):
        sys.exit("error: MLX has no GPU here; install mlx[cuda13] on a machine with one")
    rows: list[tuple[str, str, float, str]] = []
    failures: dict[str, str] = {}
    for name in args.only or PARTS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        started = time.perf_counter()
        try:
            rows += PARTS[name]()
        except Exception:  # noqa: BLE001 (recorded; the other parts still run)
            failures[name] = traceback.format_exc()
            print(failures[name], file=sys.stderr)
        rows.append(("part", name, time.perf_counter() - started, "s"))
    shown = [(what, variant, f"{value:.4g}", unit) for what, variant, value, unit in rows]
    print(table(("measurement", "variant", "value", "unit"), shown))
    record = {"machine": machine_info(), "rows": rows, "failures": failures}
    args.record.write_text(json.dumps(record, indent=2) + "\n")
    sys.exit(f"error: failed: {', '.join(failures)}" if failures else 0)


def seconds(work: Callable[[], Any]) -> float:
    """Median time of evaluating the work, after two warm-up runs."""
    taken = []
    for _ in range(REPEATS + 2):
        started = time.perf_counter()
        mx.eval(work())
        taken.append(time.perf_counter() - started)
    return median(taken[2:])


def tests() -> Rows:
    """Correctness of the kernel."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/gpu/test_depthwise_kernel.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout[-3000:])
    yield "tests of the kernel", done.stdout.strip().splitlines()[-1], 0, "failed"


def kernel() -> Rows:
    """Time of each convolution of FastViTHD at 1024 px: MLX (cuDNN) and the custom kernel."""
    for dtype in (mx.float16, mx.bfloat16):
        for size, stride in ((3, 1), (7, 1), (7, 2)):
            for stage in range(4):
                channels, side = 96 * 2**stage, 256 // 2**stage
                count = 2 if stride == 2 else 1
                x = mx.random.normal((1, side, side, channels)).astype(dtype)
                kernels = [mx.random.normal((channels, size, size, 1)).astype(dtype)] * count
                weight, biases = depthwise.arranged(kernels), mx.zeros((1, count * channels))
                mx.eval(x, kernels, weight, biases)
                name = f"{size}x{size}, stride {stride}, {channels} channels, {side} px, {dtype}"
                convolve = partial(mx.conv2d, groups=channels, stride=stride, padding=size // 2)
                work: dict[str, Callable[[], Any]] = {
                    "MLX": lambda: [convolve(x, k) for k in kernels],  # noqa: B023
                    "own": lambda: depthwise.depthwise_conv(x, weight, biases, stride),  # noqa: B023
                }
                for variant, one in work.items():
                    taken = seconds(lambda: [one() for _ in range(20)]) / 20  # noqa: B023
                    yield name, variant, 1e6 * taken, "us"


def tower() -> Rows:
    """Time, peak memory and error of FastViTHD, in several variants."""
    exact = random_tower("fastvithd")
    weights = exact.parameters()
    small = mx.array(inputs.pixels(0, (2, 256, 256, 3)))
    expected = exact(small)  # float32, without TF32
    mx.eval(expected)
    for dtype in (mx.float16, mx.bfloat16):
        exact.update(weights)
        exact.set_dtype(dtype)
        x = mx.array(inputs.pixels(0, (1, 1024, 1024, 3))).astype(dtype)
        for variant, patches in VERSIONS.items():
            with ExitStack() as stack:
                for owner, name, value in patches:
                    stack.enter_context(mock.patch.object(owner, name, value))
                what = f"FastViTHD, 1024 px, {dtype}"
                yield what, variant, 1e3 * seconds(lambda: exact(x)), "ms"  # noqa: B023
                mx.clear_cache()
                mx.reset_peak_memory()
                mx.eval(exact(x))
                yield f"{what}, peak memory", variant, mx.get_peak_memory() / 1e9, "GB"
                found = exact(small.astype(dtype))
                difference = mx.linalg.norm(found.astype(mx.float32) - expected)
                error = float(difference / mx.linalg.norm(expected))
                yield f"FastViTHD, 256 px, {dtype}, error", variant, error, ""


def peaks() -> Rows:
    """Time and peak memory of towers in this package and in PyTorch, one process each."""
    with TemporaryDirectory() as directory:
        for case in PEAKS:
            checkpoint = checkpoints.write(case, Path(directory))
            for contender in case.contenders:
                yield from _contender(case, contender, checkpoint)


def _contender(case: cases.Case, contender: str, checkpoint: Path) -> Rows:
    arguments = [contender, json.dumps(asdict(case)), str(checkpoint)]
    done = subprocess.run(
        [sys.executable, "-m", "bench.worker", *arguments],
        input="run\n" * 4 + "peak\n",
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    if "missing" in answers[0]:
        yield case.name, f"{contender}, not installed", 0, ""
        return
    yield case.name, contender, 1e3 * median(a["seconds"] for a in answers[2:-1]), "ms"
    yield f"{case.name}, peak memory", contender, answers[-1]["bytes"] / 1e9, "GB"


def first_token() -> Rows:
    """Breakdown of the 0.5B model's time to the first token: 1024 px, 64 tokens of text."""
    with TemporaryDirectory() as directory:
        checkpoint = checkpoints.write(cases.Case("", "first"), Path(directory))
        started = time.perf_counter()
        model, processor = mlx_fastvlm.load(checkpoint, dtype="bfloat16")
        yield "loading", "cold", 1e3 * (time.perf_counter() - started), "ms"
    answers = []
    for repetition in range(REPEATS + 1):
        photo = inputs.photo(repetition, 1024)
        options = {"resolution": 1024, "max_tokens": 1}
        answers.append(mlx_fastvlm.generate(model, processor, "x" * 44, photo, **options).stats)
        if not repetition:
            yield "first answer", "cold", 1e3 * answers.pop().ttft_s, "ms"
    for name in ("preprocess_s", "vision_s", "prefill_s", "ttft_s"):
        value = median(getattr(stats, name) for stats in answers)
        yield "first token, as reported", name, 1e3 * value, "ms"
    pixels = inputs.pixels(0, (1, 1024, 1024, 3))
    ids = mx.array(inputs.text_ids(0, 300))[None]
    moved = mx.array(pixels)
    steps: dict[str, Callable[[], Any]] = {
        "pixels to the GPU": lambda: mx.array(pixels),
        "image tower and projector": lambda: model.encode_image(moved),
        "prefill of 300 tokens": lambda: model(ids, model.make_cache(300), last_only=True),
    }
    for name, work in steps.items():
        yield "first token, in steps", name, 1e3 * seconds(work), "ms"
    for name, work in steps.items():  # host time only, while the GPU is idle
        mx.synchronize()
        started = time.perf_counter()
        result = work()
        yield "first token, building the graph", name, 1e3 * (time.perf_counter() - started), "ms"
        mx.eval(result)


def _run_at_once(parts: list[Any], x: mx.array, training: bool) -> mx.array:
    for part in parts:
        x = part(x)
    return x


VERSIONS: dict[str, list[tuple[Any, str, Any]]] = {
    "in one evaluation": [(fastvit, "run", _run_at_once)],
    "in pieces": [],
    "in pieces, own kernel": [(depthwise, "use_own", lambda: True)],
}
PARTS: dict[str, Callable[[], Rows]] = {
    function.__name__.replace("_", "-"): function
    for function in (tests, kernel, tower, peaks, first_token)
}

if __name__ == "__main__":
    main()
