"""Benchmark batched requests against the same requests one by one."""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fastvlm import FastVLM, ImageCache, Processor, Request, generate, generate_batch, load
from mlx_fastvlm.generation.batch_cache import BatchKVCache

from .record import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="demo", help="default: demo")
    parser.add_argument("--requests", type=int, default=8, metavar="N", help="default: 8")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="default: 32")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="default: 5")


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    model, processor = load(args.model)
    processor.tokenizer.stop_ids = frozenset()  # all answers have the same length
    times: dict[str, list[tuple[float, float]]] = {}
    for repeat in range(args.repeats + 1):
        for name, work in workloads(model, processor, args.requests, args.tokens).items():
            measured = timed(work)
            if repeat:  # the first is a warm-up
                times.setdefault(name, []).append(measured)
    rows = []
    for images in ("known", "fresh"):
        for kind, which in (("wall_s", 0), ("cpu_s", 1)):
            medians = {name: median(pair[which] for pair in pairs) for name, pairs in times.items()}
            single, batch = medians[f"one by one, {images}"], medians[f"batch, {images}"]
            prefill = medians[f"prefill, {images}"]
            step, batch_step = medians["steps of one"], medians["steps of the batch"]
            ceiling = (prefill + args.requests * step) / (prefill + batch_step)
            count = args.requests * args.tokens
            per_s = [f"{count / seconds:.0f}" for seconds in (single, batch)]
            rows.append((images, kind, *per_s, f"{single / batch:.2f}", f"{ceiling:.2f}"))
    figures = {
        name: {"wall_s": [p[0] for p in pairs], "cpu_s": [p[1] for p in pairs]}
        for name, pairs in times.items()
    }
    head = ["images", "time", "tokens/s one by one", "in a batch", "ratio", "ceiling"]
    return table(head, rows), figures


def workloads(
    model: FastVLM, processor: Processor, count: int, tokens: int
) -> dict[str, Callable[[], Any]]:
    """Return what to time: both variants, and the parts that the ceiling is computed from."""
    size = processor.image_size
    rng = np.random.default_rng()
    images = [rng.integers(0, 256, (size, size, 3), np.uint8) for _ in range(count)]
    questions = ["Describe this image. " * (1 + i % 3) for i in range(count)]
    known = ImageCache()
    for image in images:
        generate(model, processor, "q", image, max_tokens=1, image_cache=known)

    def one_by_one(cache: ImageCache, tokens: int) -> None:
        for question, image in zip(questions, images, strict=True):
            generate(model, processor, question, image, max_tokens=tokens, image_cache=cache)

    def batch(cache: ImageCache) -> None:
        pairs = zip(questions, images, strict=True)
        requests = [Request(question, image, max_tokens=tokens) for question, image in pairs]
        generate_batch(model, processor, requests, max_batch_size=count, image_cache=cache)

    length = processor(questions[0], images[0]).input_ids.size
    return {
        "one by one, known": lambda: one_by_one(known, tokens),
        "batch, known": lambda: batch(known),
        "one by one, fresh": lambda: one_by_one(ImageCache(), tokens),
        "batch, fresh": lambda: batch(ImageCache()),
        "prefill, known": lambda: one_by_one(known, 1),
        "prefill, fresh": lambda: one_by_one(ImageCache(), 1),
        "steps of one": decoding(model, 1, length, tokens - 1),
        "steps of the batch": decoding(model, count, length, tokens - 1),
    }


def decoding(model: FastVLM, rows: int, length: int, steps: int) -> Callable[[], None]:
    """Return a workload of decoder passes only, without sampling or detokenising."""
    single = model.make_cache(length)
    mx.eval(model(mx.zeros((1, length), mx.int32), single))
    caches = [BatchKVCache() for _ in single]
    for batch, layer in zip(caches, single, strict=True):
        for _ in range(rows):
            batch.add(layer)
    ids = mx.zeros((rows, 1), mx.int32)

    def work() -> None:
        for _ in range(steps):
            mx.eval(mx.argmax(model(ids, caches, last_only=True), axis=-1))
        for layer in caches:
            layer.trim(steps)

    return work


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Return wall-clock and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu
