"""Estimate the time of each stage on an Apple chip, from its FLOPs and bytes.

The floor assumes that every product runs at the chip's peak or its bandwidth, whichever is slower,
and that all else is fused into it. The expected time uses the fractions of both that MLX has been
measured to reach, and counts all memory traffic. It is an estimate, accurate to 25 % at best.
"""

import argparse
from collections import Counter
from functools import partial
from typing import Any

import mlx.core as mx

from . import counts, models
from .chips import CHIPS, Chip
from .graph import Graphs, Kernel, gpu_graphs, leaf, make_weightless
from .record import table

# Fractions of the chip's limits. Matrix products: steel_gemm on an M3 Ultra (mlx issue 3196), and
# prefill in mlx-lm's BENCHMARKS.md; with matrix units (M5) a guess. Depthwise: PyTorch on an M2
# Ultra (mlx pull request 2036). Other convolutions: mlx's kernels ported to an M1 Pro (tract
# issues 2549 and 2551).
MATRIX, MATRIX_UNITS, DEPTHWISE, CONVOLUTION, BANDWIDTH = 0.80, 0.70, 0.15, 0.45, 0.85
# Overhead per kernel: decoding in mlx-lm's BENCHMARKS.md takes about 55 us per layer beyond its
# memory traffic, for some 20 kernels.
SECONDS_PER_KERNEL = 2.75e-6
DIGITS = (0, 1, 0, 2, 2)  # decimals of the columns of the table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--chip", choices=CHIPS, default="m1", metavar="|".join(CHIPS))
    parser.add_argument("--size", choices=models.SIZES, default="0.5b")
    parser.add_argument("--resolution", type=int, default=models.RESOLUTION, metavar="R")


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    with gpu_graphs() as graphs:
        stages = read_stages(graphs, args.size, args.resolution)
    chip = CHIPS[args.chip]
    figures = {stage: stage_figures(kernels, chip) for stage, kernels in stages.items()}
    first = [figures[stage] for stage in stages if not stage.startswith("decode")]
    figures["to the first token"] = {key: sum(f[key] for f in first) for key in first[0]}
    rows = [
        [
            stage,
            *(f"{value:.{digits}f}" for value, digits in zip(row.values(), DIGITS, strict=True)),
        ]
        for stage, row in figures.items()
    ]
    speeds = "; ".join(
        f"{stage}: {1e3 / row['expected_ms']:.0f} tokens/s, at most {1e3 / row['floor_ms']:.0f}"
        for stage, row in figures.items()
        if stage.startswith("decode")
    )
    title = f"FastVLM-{args.size.upper()} at {args.resolution} px on an {args.chip}, estimated"
    text = table(("stage", "kernels", "GFLOP", "MB", "floor, ms", "expected, ms"), rows)
    return f"{title}\n\n{text}\n\n{speeds}", {"chip": args.chip, "stages": figures}


def read_stages(graphs: Graphs, size: str, resolution: int) -> dict[str, list[Kernel]]:
    """The kernels of each stage, from pixels to tokens."""
    model = models.ours(size)
    make_weightless(model)
    tower = model.vision_tower
    pixels = leaf(mx.zeros((1, resolution, resolution, 3), mx.float16))
    stages, x = {}, pixels
    parts: dict[str, Any] = {"stem": tower.stem}
    parts |= {f"stage {i}": stage for i, stage in enumerate(tower.stages, start=1)}
    for name, part in (parts | {"final convolution": tower.final_conv}).items():
        stages[name] = graphs.kernels(partial(part, x))
        x = leaf(part(x))
    whole = Counter(graphs.kernels(lambda: model.encode_image(pixels)))
    tower_alone = Counter(kernel for kernels in stages.values() for kernel in kernels)
    stages["projector"] = list((whole - tower_alone).elements())
    prompt = (resolution // model.config.vision.stride) ** 2 + models.QUESTION_TOKENS
    prefill, decode = counts.count_our_decoder(graphs, model, prompt)
    stages |= {f"prefill of {prompt} tokens": prefill, "decode step, float16": decode}
    for bits in (8, 4):
        model = models.ours(size)
        counts.quantize(model, bits)
        stages[f"decode step, {bits}-bit"] = counts.count_our_decoder(graphs, model, prompt)[1]
    return stages


def stage_figures(kernels: list[Kernel], chip: Chip) -> dict[str, float]:
    return {
        "kernels": len(kernels),
        "gflop": sum(kernel.flops for kernel in kernels) / 1e9,
        "mb": sum(kernel.bytes for kernel in kernels) / 1e6,
        "floor_ms": 1e3 * sum(floor(kernel, chip) for kernel in kernels),
        "expected_ms": 1e3 * sum(expected(kernel, chip) for kernel in kernels),
    }


def floor(kernel: Kernel, chip: Chip) -> float:
    """Seconds at the chip's limits; everything but products counts as fused, so free."""
    if not kernel.flops:
        return 0.0
    peak = chip.flops if "Convolution" in kernel.name else chip.matrix_flops
    return max(kernel.flops / peak, kernel.bytes / chip.bandwidth)


def expected(kernel: Kernel, chip: Chip) -> float:
    """Seconds at the fractions of the chip's limits that MLX reaches."""
    if kernel.name == "DepthwiseConvolution":
        speed = DEPTHWISE * chip.flops
    elif kernel.name == "Convolution":
        speed = CONVOLUTION * chip.flops
    elif chip.matrix_flops > chip.flops:
        speed = MATRIX_UNITS * chip.matrix_flops
    else:
        speed = MATRIX * chip.matrix_flops
    streaming = kernel.bytes / (BANDWIDTH * chip.bandwidth)
    return max(kernel.flops / speed, streaming) + SECONDS_PER_KERNEL
