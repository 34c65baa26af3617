"""Count primitives and bytes of each step on a GPU, from MLX's graphs, for us and mlx-vlm.

Views are free. "Elements" are the bytes that primitives other than products (matrix products,
convolutions, attention) read and write; products cannot avoid their traffic, and large ones are
limited by arithmetic.
"""

import argparse
from collections import Counter
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlx_fastvlm import FastVLM

from . import models
from .graph import Graphs, Kernel, arrays, gpu_graphs, leaf, make_weightless
from .record import table

VISION = "FastViTHD, 1024 px"
BLOCK = "one RepMixer block"
STAGE, BLOCK_INPUT = 2, (1, 64, 64, 384)  # the stage with the most blocks, at 1024 px
WEIGHTS = ("float16", "4-bit")
PROMPT = models.IMAGE_TOKENS + models.QUESTION_TOKENS
Counts = dict[str, list[Kernel]]  # kernels by step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=models.SIZES, default="0.5b")


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    with gpu_graphs() as graphs:
        counts = {"ours": count_ours(graphs, args.size)}
    if models.has_mlx_vlm():
        models.import_mlx_vlm()  # before gpu_graphs, which patches its compiled functions
        with gpu_graphs() as graphs:
            counts["mlx-vlm"] = count_mlx_vlm(graphs, args.size)
    header = ["step"]
    for name in counts:
        header += [f"{name}: primitives", "MB", "of elements"]
    rows = []
    for step in counts["ours"]:
        row = [step]
        for name in counts:
            kernels = counts[name][step]
            row += [str(len(kernels)), f"{traffic(kernels):.1f}", f"{elements(kernels):.1f}"]
        rows.append(row)
    text = table(header, rows)
    if "mlx-vlm" not in counts:
        text += f"\n\nmlx-vlm: {models.NO_MLX_VLM}"
    return text, {"counts": {name: _as_json(steps) for name, steps in counts.items()}}


def traffic(kernels: list[Kernel]) -> float:
    """Bytes read and written, in MB."""
    return sum(kernel.bytes for kernel in kernels) / 1e6


def elements(kernels: list[Kernel]) -> float:
    """Bytes read and written by everything but products, in MB."""
    return traffic([kernel for kernel in kernels if not kernel.flops])


def _as_json(steps: Counts) -> dict[str, Any]:
    return {
        step: {
            "primitives": len(kernels),
            "mb": traffic(kernels),
            "elements_mb": elements(kernels),
            "by_name": Counter(kernel.name for kernel in kernels),
        }
        for step, kernels in steps.items()
    }


def count_ours(graphs: Graphs, size: str) -> Counts:
    model = models.ours(size)
    make_weightless(model)
    pixels = leaf(mx.zeros((1, models.RESOLUTION, models.RESOLUTION, 3)))
    tower, block = model.vision_tower, model.vision_tower.stages[STAGE].blocks[0]
    counts = {
        VISION: graphs.kernels(lambda: tower(pixels)),
        BLOCK: graphs.kernels(lambda: block(leaf(mx.zeros(BLOCK_INPUT, mx.float16)))),
    }
    for weights in WEIGHTS:
        if weights == "4-bit":
            quantize(model, 4)
        counts |= by_step(weights, *count_our_decoder(graphs, model, PROMPT))
    return counts


def count_mlx_vlm(graphs: Graphs, size: str) -> Counts:
    from mlx_vlm.models.cache import make_prompt_cache

    model = models.mlx_vlm(size)
    make_weightless(model)
    pixels = leaf(mx.zeros((1, models.RESOLUTION, models.RESOLUTION, 3), mx.float16))
    tower, decoder = model.vision_tower, model.language_model
    stages = [part for part in tower.vision_model.network if isinstance(part, list)]
    block = stages[STAGE][0]
    counts = {
        VISION: graphs.kernels(lambda: tower(pixels)[1]),
        BLOCK: graphs.kernels(lambda: block(leaf(mx.zeros(BLOCK_INPUT, mx.float16)))),
    }

    def logits(ids: mx.array, cache: Any, embeddings: mx.array | None) -> mx.array:
        return decoder(ids, cache=cache, inputs_embeds=embeddings).logits

    for weights in WEIGHTS:
        if weights == "4-bit":
            quantize(model, 4)
        cache, width = make_prompt_cache(decoder), decoder.config.hidden_size
        # Its `generate` processes the last token of the prompt in a separate step.
        passes = (PROMPT - 1, 1)
        counts |= by_step(weights, *_count_decoder(graphs, logits, cache, width, passes))
    return counts


def quantize(model: Any, bits: int) -> None:
    """Quantise the decoder and its embedding, in groups of 64."""
    nn.quantize(model.language_model, 64, bits)
    make_weightless(model)


def by_step(weights: str, prefill: list[Kernel], decode: list[Kernel]) -> Counts:
    return {f"prefill of {PROMPT} tokens, {weights}": prefill, f"decode step, {weights}": decode}


def count_our_decoder(
    graphs: Graphs, model: FastVLM, prompt: int
) -> tuple[list[Kernel], list[Kernel]]:
    """Kernels of a prompt of `prompt` embeddings up to the first token; then of one more token."""

    def logits(ids: mx.array, cache: Any, embeddings: mx.array | None) -> mx.array:
        return model(ids, cache, embeddings, last_only=True)

    cache, width = model.make_cache(prompt + 1), model.config.text.hidden_size
    return _count_decoder(graphs, logits, cache, width, (prompt,))


def _count_decoder(
    graphs: Graphs,
    logits: Callable[[mx.array, Any, mx.array | None], mx.array],
    cache: list[Any],
    width: int,
    passes: tuple[int, ...],
) -> tuple[list[Kernel], list[Kernel]]:
    states = [vars(layer) for layer in cache]

    def token(length: int, embeddings: mx.array | None) -> mx.array:
        ids = leaf(mx.zeros((1, length), mx.int32))
        return mx.argmax(logits(ids, cache, embeddings)[:, -1])

    def count_pass(length: int, *, last: bool) -> list[Kernel]:
        embeddings = leaf(mx.zeros((1, length, width), mx.float16))
        if last:
            return graphs.kernels(lambda: token(length, embeddings))
        return graphs.kernels(lambda: (token(length, embeddings), arrays(states))[1])

    prefill: list[Kernel] = []
    for length in passes:
        prefill += count_pass(length, last=length == passes[-1])
        for layer in states:
            layer |= tree_map(lambda x: leaf(x) if isinstance(x, mx.array) else x, layer)
    return prefill, graphs.kernels(lambda: token(1, None))
