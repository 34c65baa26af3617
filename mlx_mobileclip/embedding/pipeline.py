"""Embed a stream of images or texts in order; threads prepare inputs while the model runs."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from numbers import Integral
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, ModelError
from ..models.clip import MobileCLIP
from ..preprocess.processor import Processor

MAX_WORKERS = 8  # default limit; more threads hardly speed up decoding


@dataclass(frozen=True, slots=True)
class Embedded:
    """Result for one input: an embedding or an error.

    Attributes:
        name: Path of the image, or the text, as given.
        row: Embedding, float32 (E,) of unit length; None on error.
        error: Reason why there is no embedding; None on success.
    """

    name: str
    row: NDArray[np.float32] | None
    error: ModelError | None


def iter_embeddings(
    model: MobileCLIP,
    processor: Processor,
    paths: Iterable[str],
    *,
    batch_size: int = 32,
    workers: int | None = None,
) -> Generator[Embedded, None, None]:
    """Embed image files; threads decode up to two batches ahead of the model.

    Args:
        model: Model with an image tower.
        processor: The model's processor.
        paths: Image files.
        batch_size: Images per forward pass.
        workers: Decoding threads; by default one per core, at most 8.

    Returns:
        A generator of one result per path, in order. An image that cannot be read, or whose
        embedding is not finite, has an error in place of a row. `contextlib.closing` stops the
        threads if the generator is not exhausted.

    Raises:
        DataError: batch_size is below 1, or paths is not a list.
    """

    def prepare(path: str) -> NDArray[Any]:
        return processor.pixels(path)

    def encode(pixels: mx.array) -> mx.array:
        return model.encode_image(pixels, normalize=True)

    check_sequence(paths, "paths")
    check_batch_size(batch_size)
    workers = workers or min(MAX_WORKERS, os.cpu_count() or 1)
    return embed_prepared(paths, prepare, encode, batch_size, workers)


def iter_text_embeddings(
    model: MobileCLIP, processor: Processor, texts: Iterable[str], *, batch_size: int = 128
) -> Generator[Embedded, None, None]:
    """Embed texts in the same way as `iter_embeddings`; a text that is not UTF-8 is an error.

    Raises:
        DataError: batch_size is below 1, or texts is not a list.
        ModelError: the model has no text tower.
    """

    def prepare(text: str) -> NDArray[Any]:
        if not is_unicode(text):
            raise DataError("is not UTF-8")
        return np.asarray(processor.texts([text]))[0]

    def encode(ids: mx.array) -> mx.array:
        return model.encode_text(ids, normalize=True)

    check_sequence(texts, "texts")
    check_batch_size(batch_size)
    text_tower(model)
    return embed_prepared(texts, prepare, encode, batch_size, workers=1)


def check_sequence(names: Iterable[str], what: str) -> None:
    """Raise DataError for a single string, whose characters would be taken for names."""
    if isinstance(names, (str, bytes)) or not isinstance(names, Iterable):
        raise DataError(f"{what} takes a list, not a {type(names).__name__}")


def check_batch_size(batch_size: int) -> None:
    """Raise DataError unless the batch size is an integer of at least 1."""
    if not isinstance(batch_size, Integral) or batch_size < 1:
        raise DataError(f"the batch size is {batch_size!r:.40}; it must be at least 1")


def is_unicode(text: str) -> bool:
    """Whether a text is free of surrogates, which stand for bytes that are not UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def text_tower(model: MobileCLIP) -> tuple[nn.Module, mx.array]:
    """Return the text tower and the logit scale.

    Raises:
        ModelError: the model has only an image tower.
    """
    if model.text is None or model.logit_scale is None:
        raise ModelError(
            "this checkpoint has an image tower only; texts and labels need a checkpoint with both "
            "towers, such as apple/MobileCLIP2-S0"
        )
    return model.text, model.logit_scale


def embed_prepared(
    names: Iterable[str],
    prepare: Callable[[str], NDArray[Any]],
    encode: Callable[[mx.array], mx.array],
    batch_size: int,
    workers: int,
) -> Generator[Embedded, None, None]:
    """Prepare inputs by name in threads, and encode them in batches; results are in order."""
    with closing(_prepare_ahead(names, prepare, workers, 2 * batch_size)) as prepared:
        while batch := list(islice(prepared, batch_size)):
            yield from _encode(batch, encode)


def _prepare_ahead(
    names: Iterable[str], prepare: Callable[[str], NDArray[Any]], workers: int, ahead: int
) -> Generator[tuple[str, NDArray[Any] | ModelError], None, None]:
    """Prepare up to `ahead` inputs in advance in threads; yields them in order."""
    pool = ThreadPoolExecutor(workers)
    pending: deque[tuple[str, Future[NDArray[Any]]]] = deque()
    try:
        for name in names:
            pending.append((name, pool.submit(prepare, name)))
            if len(pending) > ahead:
                yield _result(*pending.popleft())
        while pending:
            yield _result(*pending.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _result(name: str, future: Future[NDArray[Any]]) -> tuple[str, NDArray[Any] | ModelError]:
    error = future.exception()
    if error is None:
        return name, future.result()
    if not isinstance(error, Exception):
        raise error
    if isinstance(error, ModelError):
        return name, error
    return name, DataError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def _encode(
    batch: Sequence[tuple[str, NDArray[Any] | ModelError]],
    encode: Callable[[mx.array], mx.array],
) -> list[Embedded]:
    """Run the model once on the inputs of a batch that were prepared without error."""
    inputs = [value for _, value in batch if not isinstance(value, ModelError)]
    rows: Iterable[NDArray[np.float32]] = ()
    if inputs:
        rows = np.asarray(encode(mx.array(np.stack(inputs))).astype(mx.float32))
    remaining = iter(rows)
    return [
        Embedded(name, None, value)
        if isinstance(value, ModelError)
        else _check(name, next(remaining))
        for name, value in batch
    ]


def _check(name: str, row: NDArray[np.float32]) -> Embedded:
    if np.isfinite(row).all():
        return Embedded(name, row, None)
    return Embedded(name, None, DataError("its embedding is not finite; try --dtype float32"))
