"""Accuracy of the demo models on held-out scenes.

    PYTHONPATH=. python tests/demo/measure.py            # the tables of tests/demo/README.md
    PYTHONPATH=. python tests/demo/measure.py --count 100
    PYTHONPATH=. python tests/demo/measure.py --quantized    # FastVLM in every quantisation

Runs on MLX, through the packages' public functions.
"""

import argparse
import multiprocessing
import os
import random
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import numpy as np
from captions import LABELS
from harder_questions import ORDINALS, about, compare
from PIL.Image import Image
from questions import Question, article, description
from tasks import TASKS, ask
from variations import COUNT, detailed, variations
from world import HELD_OUT, Scene, render, scene

import mlx_fastvlm
import mlx_mobileclip
from convert import __main__ as convert
from mlx_fastvlm.models.fastvlm import PARTS
from mlx_fastvlm.preprocess.tokenizer import TURN_END
from mlx_mobileclip import recall, top_k_accuracy

TASK_NAMES = tuple(TASKS)
SETTINGS = {
    "384 px, pad": {},
    "256 px, pad": {"resolution": 256},
    "512 px, pad": {"resolution": 512},
    "384 px, crop": {"image_mode": "crop"},
}
NATIVE = {"": {}}
ALL_PARTS = ("--q-parts", *PARTS)
QUANTIZATIONS: dict[str, tuple[str, ...]] = {  # options of convert
    "not quantised": (),
    **{f"{bits} bits": ("-q", "--q-bits", str(bits)) for bits in (8, 6, 5, 4, 3, 2)},
    **{f"{bits} bits, mixed": ("-q", "--q-mixed", "--q-bits", str(bits)) for bits in (4, 3, 2)},
    **{mode: ("-q", "--q-mode", mode) for mode in ("mxfp8", "mxfp4", "nvfp4")},
    **{f"{bits} bits, all parts": ("-q", "--q-bits", str(bits), *ALL_PARTS) for bits in (8, 4)},
    "4 bits, mixed, all parts": ("-q", "--q-mixed", *ALL_PARTS),
    **{f"at most {size}": ("-q", "--max-size", size) for size in ("4MB", "3MB", "2.5MB")},
}
KV_BITS = {"8-bit KV cache": 8, "4-bit KV cache": 4}
# First seeds of further sets of scenes.
ZERO_SHOT, RETRIEVAL, VARIATIONS, PAIRS = (HELD_OUT + i * 1_000_000 for i in (1, 2, 3, 4))


def check_answers(
    model: mlx_fastvlm.FastVLM,
    processor: mlx_fastvlm.Processor,
    image: Image | list[Image],
    asked: list[Question],
    kv_bits: int | None = None,
    **settings: object,
) -> list[bool]:
    """Whether greedy decoding gives the right answer to each question, asked separately.

    It does if every token of the answer is the most likely one, given those before it. So one
    forward pass per answer is enough. The common prefix of the prompts is computed once.
    """
    tokenizer = processor.tokenizer
    inputs = [processor(question.text, image, **settings) for question in asked]
    prompts = [np.array(each.input_ids).tolist() for each in inputs]
    prefix = len(prompts[0])
    for prompt in prompts:
        pairs = zip(prompt[:-1], prompts[0], strict=False)
        prefix = min(prefix, next((i for i, (a, b) in enumerate(pairs) if a != b), len(prompt) - 1))
    cache = model.make_cache(bits=kv_bits)
    model(mx.array([prompts[0][:prefix]]), cache, pixels=inputs[0].pixels)
    results = []
    for question, prompt in zip(asked, prompts, strict=True):
        answer = [*tokenizer.encode(question.answer), tokenizer.added[TURN_END]]
        rest = prompt[prefix:] + answer
        logits = model(mx.array([rest]), cache)[0, -len(answer) - 1 : -1, : tokenizer.size]
        results.append(mx.argmax(logits, axis=-1).tolist() == answer)
        for layer in cache:
            layer.trim(len(rest))
    return results


def questions(shown: Scene, tasks: tuple[str, ...] = TASK_NAMES) -> list[Question]:
    """One question per task, where the scene has one."""
    rng = random.Random(shown.seed)
    asked = [ask(shown, rng, task) for task in tasks]
    return [question for question in asked if question is not None]


def held_out_questions(count: int) -> Iterator[tuple[Scene, list[Question]]]:
    """Yield held-out scenes with questions, until there are `count` of each task."""
    left = dict.fromkeys(TASK_NAMES, count)
    seed = HELD_OUT
    while any(left.values()):
        shown = scene(seed)
        asked = [question for question in questions(shown) if left[question.task]]
        for question in asked:
            left[question.task] -= 1
        if asked:
            yield shown, asked
        seed += 1


def accuracy_by_task(
    model: str | Path, count: int, settings: dict[str, dict[str, Any]]
) -> dict[str, dict[str, float]]:
    """Exact-match accuracy by setting and task, in percent."""
    loaded = mlx_fastvlm.load(model)
    found = {setting: dict.fromkeys(TASK_NAMES, 0) for setting in settings}
    started = time.monotonic()
    for number, (shown, asked) in enumerate(held_out_questions(count)):
        image = render(shown)
        for name, setting in settings.items():
            for question, correct in zip(
                asked, check_answers(*loaded, image, asked, **setting), strict=True
            ):
                found[name][question.task] += correct
        if number % 50 == 0:
            seconds = time.monotonic() - started
            print(f"{number} scenes, {seconds:.0f} s", end="\r", file=sys.stderr)
    return {
        name: {task: 100 * correct / count for task, correct in shares.items()}
        for name, shares in found.items()
    }


def two_image_accuracy(model: str | Path, count: int = 200) -> dict[str, float]:
    """Exact-match accuracy on pairs of images by kind of question, in percent.

    A question compares the two, is about one of them, or asks for the text in one of two that both
    have a text.
    """
    loaded = mlx_fastvlm.load(model)
    found: dict[str, list[bool]] = {"compare": [], "one of two": [], "text of one of two": []}
    seed = PAIRS
    while min(map(len, found.values())) < count:
        pair, rng = (scene(seed), scene(seed + 1)), random.Random(seed)
        which, seed = rng.randrange(2), seed + 2
        simple = ask(pair[which], rng, rng.choice(TASK_NAMES))
        texts = all(shown.text for shown in pair)
        one_of_two = {
            "one of two": simple,
            "text of one of two": ask(pair[which], rng, "read") if texts else None,
        }
        asked = {"compare": compare(*pair, rng)} | {
            kind: replace(question, text=about(question.text, ORDINALS[which]))
            for kind, question in one_of_two.items()
            if question is not None
        }
        due = {k: q for k, q in asked.items() if q is not None and len(found[k]) < count}
        images = [render(shown) for shown in pair]
        results = check_answers(*loaded, images, list(due.values())) if due else []
        for kind, correct in zip(due, results, strict=True):
            found[kind].append(correct)
    return {kind: 100 * sum(correct) / count for kind, correct in found.items()}


def mobileclip_accuracy(model: str | Path, count: int, among: int = 200) -> dict[str, float]:
    """Zero-shot top-1 over 48 labels, and recall at 1 among `among` scenes, in percent."""
    clip, processor = mlx_mobileclip.load(model)

    def embed_images(scenes: list[Scene]) -> mx.array:
        rows = []
        for start in range(0, len(scenes), 32):
            pixels = processor.images([render(s) for s in scenes[start : start + 32]])
            rows.append(clip.encode_image(pixels, normalize=True))
            mx.eval(rows[-1])
            print(f"{start} scenes embedded", end="\r", file=sys.stderr)
        return mx.concatenate(rows)

    single = [scene(ZERO_SHOT + i, (1, 1), central=True) for i in range(count)]
    labels = clip.encode_text(processor.texts([article(name) for name in LABELS]), normalize=True)
    targets = [LABELS.index(shown.shapes[0].name) for shown in single]
    many = [scene(RETRIEVAL + i, central=True) for i in range(among)]
    texts = clip.encode_text(processor.texts([description(s) for s in many]), normalize=True)
    found = recall(embed_images(many), texts, range(len(many)))
    close = [s for i in range(among // COUNT) for s in variations(VARIATIONS + i)]
    said = [text for shown in close if (text := detailed(shown))]
    texts = clip.encode_text(processor.texts(said), normalize=True)
    hard = recall(embed_images(close), texts, range(len(close)))
    return {
        "zero-shot top-1": 100 * top_k_accuracy(embed_images(single), labels, targets)[1],
        "image to text R@1": 100 * found.image_to_text[1],
        "text to image R@1": 100 * found.text_to_image[1],
        "variations, image to text R@1": 100 * hard.image_to_text[1],
        "variations, text to image R@1": 100 * hard.text_to_image[1],
    }


def quantized_row(name: str, model: str, count: int) -> tuple[int, str, dict[str, float]]:
    """Bytes of the weights, KL divergence in nats and accuracy by task of a quantised model.

    It is measured with its weights dequantised, which is several times as fast on a CPU.
    """
    with TemporaryDirectory() as directory:
        path, floats = Path(directory) / "quantized", Path(directory) / "floats"
        quantize, dequantize = QUANTIZATIONS.get(name, ()), ("--dequantize", "--dtype", "float32")
        for source, target, options in (
            (model, path, quantize),
            (str(path), floats, dequantize if quantize else ()),
        ):
            arguments = ["--model", source, "--mlx-path", str(target), "--quiet", *options]
            if convert.main(arguments):
                raise SystemExit(f"{name}: cannot be converted")
        size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        kl = re.findall(r"\| (\S+) nats", (path / "README.md").read_text())
        settings = {name: {"kv_bits": KV_BITS[name]}} if name in KV_BITS else NATIVE
        (shares,) = accuracy_by_task(floats, count, settings).values()
    return size, kl[0] if kl else "", shares


def print_quantized(model: str, count: int) -> None:
    """Measure all quantisations in parallel and print a table."""
    print_header("MB", "KL")
    names = [*QUANTIZATIONS, *KV_BITS]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        found = pool.map(quantized_row, names, repeat(model), repeat(count))
        for name, (size, kl, shares) in zip(names, found, strict=True):
            print_row(name, shares, f"{size / 1e6:.2f}", kl)


def print_header(*first: str) -> None:
    columns = (*first, *TASK_NAMES)
    print(f"\n| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")


def print_row(name: str, shares: dict[str, float], *first: str) -> None:
    values = (*first, *(f"{shares[task]:.1f}" for task in TASK_NAMES))
    print(f"| {name} | {' | '.join(values)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the demo models on held-out scenes.")
    parser.add_argument("--fastvlm", default="demo", help="checkpoint; - for none")
    parser.add_argument("--mobileclip", default="demo", help="checkpoint; - for none")
    parser.add_argument("--count", type=int, default=1000, help="questions of each task")
    parser.add_argument("--quantized", action="store_true", help="FastVLM, quantised in every mode")
    options = parser.parse_args()
    if options.quantized:
        return print_quantized(options.fastvlm, options.count)
    if options.fastvlm != "-":
        table = accuracy_by_task(options.fastvlm, options.count, SETTINGS)
        print_header()
        for name, shares in table.items():
            print_row(name, shares)
        for name, share in two_image_accuracy(options.fastvlm).items():
            print(f"| {name} | {share:.1f} |")
    if options.mobileclip != "-":
        for name, share in mobileclip_accuracy(options.mobileclip, options.count).items():
            print(f"| {name} | {share:.1f} |")


if __name__ == "__main__":
    main()
