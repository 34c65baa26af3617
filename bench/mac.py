"""Measure on a Mac what cannot be measured elsewhere, and write a record to send back.

Each measurement compares implementations of an operation, or replaces an estimate.
Random weights take the same time as trained ones, but the effect of half precision can only be
measured with --model apple/FastVLM-0.5B.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import synthetic

import mlx_fastvlm
import mlx_mobileclip
from mlx_fastvlm import FastVLM
from mlx_mobileclip import Quantization
from mlx_mobileclip.device import backend
from mlx_mobileclip.gpu import depthwise as gpu_depthwise

from . import ROOT, cases, checkpoints, inputs
from .power import Power
from .record import record_file, table

ANSWER_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Figure:
    """A row of the table."""

    measurement: str
    variant: str
    value: float
    unit: str


@dataclass(frozen=True, slots=True)
class Setting:
    """Settings of a run.

    Attributes:
        size: "0.5b", or "tiny" for a quick trial.
        repeats: Repetitions of each timing.
        model: Model for mlx_fastvlm.load.
        directory: Directory for other checkpoints.
    """

    size: str
    repeats: int
    model: str
    directory: Path

    @property
    def resolution(self) -> int:
        """Side of the images, px."""
        return 128 if self.size == "tiny" else 1024

    def seconds(self, work: Callable[[], Any]) -> float:
        """Median time of the work, with its result evaluated, after one warm-up run."""
        taken = []
        for _ in range(self.repeats + 1):
            started = time.perf_counter()
            mx.eval(work())
            taken.append(time.perf_counter() - started)
        return median(taken[1:])

    def kernel_seconds(self, kernel: Callable[..., mx.array], *arrays: Any) -> float:
        """Median time of one kernel, run ten times in one evaluation to amortise its overhead."""
        runs = 1 if self.size == "tiny" else 10
        return self.seconds(lambda: [kernel(*arrays) for _ in range(runs)]) / runs


Figures = Iterator[Figure]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="M", help="model as for mlx_fastvlm (default: random weights)"
    )
    parser.add_argument("--only", action="append", choices=MEASUREMENTS, help="may be repeated")
    parser.add_argument("--repeats", type=int, default=10, metavar="N")
    parser.add_argument("--size", choices=("tiny", "0.5b"), default="0.5b")
    parser.set_defaults(record=record_file("mac"))
    parser.add_argument(
        "--energy",
        action="store_true",
        help="also measure power with powermetrics, which needs sudo",
    )


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as temporary, Power(enabled=args.energy) as power:
        directory = Path(temporary)
        model = args.model
        if model is None:
            model = str(checkpoints.write(cases.Case("", "first", size=args.size), directory))
        setting = Setting(args.size, args.repeats, model, directory)
        for name in args.only or MEASUREMENTS:
            print(f"{name} ...", file=sys.stderr, flush=True)
            started = time.monotonic()
            figures += MEASUREMENTS[name](setting)
            watts = power.mean(started)
            if watts is not None:
                figures.append(Figure(name, "mean power of CPU, GPU and ANE", watts, "W"))
    rows = [(f.measurement, f.variant, f"{f.value:.4g}", f.unit) for f in figures]
    record = {
        "device": mx.device_info(),
        "model": args.model or f"random weights, {args.size}",
        "figures": [asdict(figure) for figure in figures],
    }
    return table(("measurement", "variant", "value", "unit"), rows), record


def random(*shape: int, dtype: mx.Dtype = mx.float16) -> mx.array:
    array = mx.random.normal(shape).astype(dtype)
    mx.eval(array)
    return array


# Comparisons of implementations.


def pointwise(setting: Setting) -> Figures:
    """Compare 1x1 convolutions as matrix products and as convolutions."""
    for stride, channels in ((8, 192), (16, 384)):
        side = setting.resolution // stride
        for dtype in (mx.float16, mx.float32):
            x = random(1, side, side, channels, dtype=dtype)
            weight = random(4 * channels, channels, dtype=dtype)
            bias = random(4 * channels, dtype=dtype)
            name = (
                f"1x1, {channels} to {4 * channels} channels, {side} x {side}, {_dtype_name(dtype)}"
            )
            product = setting.kernel_seconds(
                lambda x, w, b: mx.addmm(b, x.reshape(-1, w.shape[1]), w.T), x, weight, bias
            )
            convolution = setting.kernel_seconds(
                lambda x, w, b: mx.conv2d(x, w[:, None, None]) + b, x, weight, bias
            )
            flops = 2 * side**2 * weight.size
            yield Figure(name, "addmm", flops / product / 1e12, "TFLOP/s")
            yield Figure(name, "conv2d", flops / convolution / 1e12, "TFLOP/s")


def depthwise(setting: Setting) -> Figures:
    """Time 7x7 depthwise convolutions; those that double the channels also split in two."""

    def convolve(x: mx.array, weight: mx.array, stride: int = 1) -> mx.array:
        return mx.conv2d(x, weight, stride, 3, groups=x.shape[3])

    def convolve_split(x: mx.array, even: mx.array, odd: mx.array) -> mx.array:
        return mx.stack([convolve(x, even, 2), convolve(x, odd, 2)], axis=-1)

    for stage in range(5):
        channels, side = 96 * 2**stage, setting.resolution // 2 ** (stage + 2)
        x, weight = random(1, side, side, channels), random(channels, 7, 7, 1)
        name = f"depthwise 7x7, {channels} channels, {side} x {side}, float16"
        taken = setting.kernel_seconds(convolve, x, weight)
        yield Figure(name, "", 2 * 49 * x.size / taken / 1e9, "GFLOP/s")
        yield Figure(name, "", 2 * x.nbytes / taken / 1e9, "GB/s")
        own = None if backend() == "cpu" else gpu_depthwise.arranged([weight])
        if own is not None:  # a candidate; FASTER_ON in its file lists where it is used
            biases = mx.zeros((1, channels))
            mx.eval(own, biases)
            taken = setting.kernel_seconds(gpu_depthwise.depthwise_conv, x, own, biases, 1)
            yield Figure(name, "own kernel", 2 * 49 * x.size / taken / 1e9, "GFLOP/s")
        if stage < 4:
            name = (
                f"depthwise 7x7, {channels} to {2 * channels} channels, {side} x {side}, stride 2"
            )
            double = random(2 * channels, 7, 7, 1)
            whole = setting.kernel_seconds(convolve, x, double, 2)
            halves = setting.kernel_seconds(convolve_split, x, weight, weight)
            yield Figure(name, "whole", 1e3 * whole, "ms")
            yield Figure(name, "in two", 1e3 * halves, "ms")


def attention(setting: Setting) -> Figures:
    """Compare attention with heads of width 32 unchanged and padded to 64."""
    width = 32

    def attend(qkv: mx.array) -> mx.array:
        queries, keys, values = qkv.transpose(2, 0, 3, 1, 4)
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=width**-0.5)

    def attend_padded(qkv: mx.array) -> mx.array:
        return attend(mx.pad(qkv, [(0, 0)] * 4 + [(0, width)]))[..., :width]

    for side in (2, 4) if setting.size == "tiny" else (8, 12, 16, 20, 24, 32, 48):
        qkv = random(1, side**2, 3, 24, width)
        name = f"attention, 24 heads of {width}, {side**2} positions, float16"
        yield Figure(name, "as they are", 1e3 * setting.kernel_seconds(attend, qkv), "ms")
        yield Figure(name, "padded to 64", 1e3 * setting.kernel_seconds(attend_padded, qkv), "ms")


def half_precision(setting: Setting) -> Figures:
    """Error of the image embeddings in float16; most meaningful with real weights."""
    pixels = mx.array(inputs.pixels(0, (1, setting.resolution, setting.resolution, 3)))
    outputs = []
    for dtype in ("float32", "float16"):
        model, _ = mlx_fastvlm.load(setting.model, dtype=dtype)
        outputs.append(model.encode_image(pixels).astype(mx.float32))
        mx.eval(outputs)
    exact, half = outputs
    error = float(mx.max(mx.abs(half - exact)) / mx.max(mx.abs(exact)))
    yield Figure("image embeddings", "float16 against float32", error, "of the largest value")


def prefill(setting: Setting) -> Figures:
    """Compare a prompt in one pass with its last token in a separate step, as in mlx-lm."""
    model, _ = mlx_fastvlm.load(setting.model)
    ids = mx.array(inputs.text_ids(0, cases.DECODE_PROMPT))[None]

    def passes(*parts: mx.array) -> mx.array:
        cache = model.make_cache(ids.size)
        for part in parts:
            logits = model(part, cache, last_only=True)
            mx.eval([layer.state for layer in cache] if part is not parts[-1] else logits)
        return logits

    one = setting.seconds(lambda: passes(ids))
    two = setting.seconds(lambda: passes(ids[:, :-1], ids[:, -1:]))
    yield Figure(f"prefill of {ids.size} tokens", "one pass", 1e3 * one, "ms")
    yield Figure(f"prefill of {ids.size} tokens", "all but one, then one", 1e3 * two, "ms")


def decode(setting: Setting) -> Figures:
    """Compare our decoder (fused layers) with mlx-lm's, in mlx-lm's loop, both 4-bit."""
    from mlx_lm.generate import generate_step
    from mlx_lm.models import qwen2

    config = synthetic.apple_config(setting.size, 1024)
    separate = qwen2.Model(qwen2.ModelArgs.from_dict(config | {"model_type": "qwen2"}))
    separate.set_dtype(mx.float16)
    nn.quantize(separate, 32 if setting.size == "tiny" else 64, 4)
    mx.eval(separate.parameters())
    models = {"fused layers (ours)": _quantized(setting), "separate layers (mlx-lm)": separate}
    prompt = mx.array(inputs.text_ids(0, cases.DECODE_PROMPT))
    for variant, model in models.items():
        taken = []
        for _ in range(setting.repeats):
            steps = generate_step(prompt, model, max_tokens=ANSWER_TOKENS + 1)
            next(steps)
            started = time.perf_counter()
            tokens = sum(1 for _ in steps)
            taken.append((time.perf_counter() - started) / tokens)
        yield Figure("decode, 4-bit", variant, 1 / median(taken), "tokens/s")


def buffers(setting: Setting) -> Figures:
    """Vary how much work MLX collects per command buffer, in new processes that read it once."""
    for operations in (None, 100):
        environment = dict(os.environ)
        if operations:
            environment["MLX_MAX_OPS_PER_BUFFER"] = str(operations)
        variant = f"{operations} operations" if operations else "MLX's default"
        record = setting.directory / "buffers.json"
        options = ["--model", setting.model, "--size", setting.size, "--record", str(record)]
        options += ["--only", "tower", "--only", "answer"]
        command = [sys.executable, "-m", "bench", "mac", *options]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
        for figure in json.loads(record.read_text())["figures"]:
            name = f"{figure['measurement']}, {figure['variant']}, by command buffers"
            yield Figure(name, variant, figure["value"], figure["unit"])


def matrix_units(setting: Setting) -> Figures:
    """Time a large matrix product; more than 8 TFLOP/s on an M5 needs its matrix units."""
    side = 4 * setting.resolution
    a, b = random(side, side), random(side, side)
    taken = setting.kernel_seconds(mx.matmul, a, b)
    yield Figure(f"product of {side} x {side}, float16", "", 2 * side**3 / taken / 1e12, "TFLOP/s")


# End-to-end measurements.


def tower(setting: Setting) -> Figures:
    """Time the image tower and projector, also with `mx.compile`."""
    model, _ = mlx_fastvlm.load(setting.model)
    pixels = mx.array(inputs.pixels(0, (1, setting.resolution, setting.resolution, 3)))
    name = f"FastVLM, image tower and projector, {setting.resolution} px"
    encode_compiled = mx.compile(model.encode_image)
    for variant, encode in {"": model.encode_image, "compiled": encode_compiled}.items():
        taken = setting.seconds(partial(encode, pixels))
        yield Figure(name, variant, 1e3 * taken, "ms")
        yield Figure(name, variant, 1 / taken, "images/s")


def answer(setting: Setting) -> Figures:
    """Time a question about a photo: to the first token, and per token after it."""
    models = {"float": mlx_fastvlm.load(setting.model)[0], "4-bit": _quantized(setting)}
    processor = mlx_fastvlm.load(setting.model)[1]
    for variant, model in models.items():
        first, speed = [], []
        mx.reset_peak_memory()
        for repetition in range(setting.repeats + 1):
            photo = inputs.photo(repetition, setting.resolution)
            started = time.perf_counter()
            stream = mlx_fastvlm.stream_generate(
                model,
                processor,
                "Describe the image in detail.",
                photo,
                resolution=setting.resolution,
                max_tokens=ANSWER_TOKENS,
            )
            next(stream)
            first.append(time.perf_counter() - started)
            *_, last = stream
            speed.append(last.stats.decode_tokens_per_s)
        yield Figure("answer", f"to the first token, {variant}", 1e3 * median(first[1:]), "ms")
        yield Figure("answer", f"after it, {variant}", median(speed[1:]), "tokens/s")
        yield Figure("answer", f"peak memory, {variant}", mx.get_peak_memory() / 1e6, "MB")


def mobileclip(setting: Setting) -> Figures:
    """Time embedding images and texts in batches of 32."""
    variants = ("s0",) if setting.size == "tiny" else tuple(cases.VARIANTS)
    batch = 1 if setting.size == "tiny" else 32
    for name in variants:
        case = cases.clip_case(name, "image", batch)
        checkpoint = checkpoints.write(case, setting.directory)
        model, processor = mlx_mobileclip.load(checkpoint, variant=case.variant)
        side = model.config.preprocess.image_size
        pixels = mx.array(inputs.pixels(0, (batch, side, side, 3)))
        texts = processor.texts(["a photo of a dog"] * batch)
        image_seconds = setting.seconds(partial(model.encode_image, pixels))
        text_seconds = setting.seconds(partial(model.encode_text, texts))
        yield Figure(
            checkpoint.stem, f"images, {batch} at a time", batch / image_seconds, "images/s"
        )
        yield Figure(checkpoint.stem, f"texts, {batch} at a time", batch / text_seconds, "texts/s")


def _quantized(setting: Setting) -> FastVLM:
    quantization = Quantization(bits=4, group_size=32 if setting.size == "tiny" else 64)
    return mlx_fastvlm.load(setting.model, quantize=quantization, parts=("decoder",))[0]


def _dtype_name(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]


MEASUREMENTS: dict[str, Callable[[Setting], Figures]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        *(pointwise, depthwise, attention, half_precision, prefill, decode, buffers, matrix_units),
        *(tower, answer, mobileclip),
    )
}
