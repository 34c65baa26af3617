"""This package, through its public API."""

import ctypes
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx

import mlx_fastvlm
import mlx_mobileclip
from mlx_mobileclip.device import DTYPES
from mlx_mobileclip.preprocess.image import open_image, resize_pad, to_array

from .. import inputs
from ..cases import DECODE_PROMPT, Case
from . import Repeat, Work


def prepare(case: Case, checkpoint: Path) -> Repeat:
    if case.preprocesses:
        return _preprocess(case)
    return _mobileclip(case, checkpoint) if case.variant else _fastvlm(case, checkpoint)


def _preprocess(case: Case) -> Repeat:
    open_photo = inputs.camera(decoded=case.work == "preprocess")

    def work() -> None:
        mx.eval(mx.array(to_array(resize_pad(open_image(open_photo()), case.resolution))))

    return lambda _: work


def _mobileclip(case: Case, checkpoint: Path) -> Repeat:
    model, processor = mlx_mobileclip.load(checkpoint, variant=case.variant, dtype=case.dtype)
    side = model.config.preprocess.image_size
    images = mx.array(inputs.pixels(0, (case.batch, side, side, 3)))
    texts = processor.texts(["a photo of a dog"] * case.batch)
    if case.work == "image":
        return lambda _: lambda: mx.eval(model.encode_image(images))
    return lambda _: lambda: mx.eval(model.encode_text(texts))


def _fastvlm(case: Case, checkpoint: Path) -> Repeat:
    model, processor = mlx_fastvlm.load(checkpoint, dtype=case.dtype)
    if case.work == "decode":
        model.pop("vision_tower")  # for comparison with mlx-lm, which has none
        trim_memory()
    side, dtype = case.resolution, DTYPES[case.dtype]
    format_tokens = processor("x").input_ids.size - 1  # tokens of the chat format

    def answer(
        letter: str, repetition: int, cache: mlx_fastvlm.PromptCache | None = None
    ) -> Iterator[object]:
        first = repetition * case.images
        photos = [inputs.photo(seed, side) for seed in range(first, first + case.images)]
        question = letter * (case.tokens - format_tokens)  # one token per letter
        return mlx_fastvlm.stream_generate(
            model, processor, question, photos, resolution=side, max_tokens=1, prompt_cache=cache
        )

    def vision(repetition: int) -> Work:
        pixels = mx.array(inputs.pixels(repetition, (1, side, side, 3))).astype(dtype)
        mx.eval(pixels)  # already on the GPU, like PyTorch's
        return lambda: mx.eval(model.encode_image(pixels))

    def first(repetition: int) -> Work:
        stream = answer("x", repetition)
        return lambda: next(stream)

    def second(repetition: int) -> Work:
        cache = mlx_fastvlm.PromptCache()
        next(answer("x", repetition, cache))
        stream = answer("y", repetition, cache)
        return lambda: next(stream)

    def decode(_: int) -> Work:
        prompt = "x" * (DECODE_PROMPT - format_tokens)
        stream = mlx_fastvlm.stream_generate(model, processor, prompt, max_tokens=case.tokens + 1)
        next(stream)
        return lambda: _exhaust(stream, case.tokens)

    works: dict[str, Callable[[int], Work]] = {
        "vision": vision,
        "first": first,
        "second": second,
        "decode": decode,
    }
    return works[case.work]


def trim_memory() -> None:
    """Return freed memory to the system, which this package configures glibc to keep."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def _exhaust(stream: Iterator[object], tokens: int) -> None:
    if sum(1 for _ in stream) != tokens:
        raise RuntimeError("the answer ended early; use other weights")
