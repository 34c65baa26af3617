"""Metrics of the published tables: zero-shot top-1/5 and recall at 1, 5 and 10.

Ties rank in the order of the data, so results do not depend on a sorting algorithm, and a collapsed
model scores at chance level instead of perfectly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..errors import DataError

Embeddings = mx.array | NDArray[Any]
RECALL_AT = (1, 5, 10)
TOP_K = (1, 5)
ROWS_AT_ONCE = 512  # limits the score matrix to about 50 MB for COCO's 25,000 captions


@dataclass(frozen=True, slots=True)
class Recall:
    """Fraction of queries, 0 to 1, with a correct match among the k most similar.

    Attributes:
        image_to_text: By k, fraction of images with one of their captions in the top k.
        text_to_image: By k, fraction of captions with their image in the top k.
    """

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]


def recall(
    images: Embeddings,
    texts: Embeddings,
    image_of_text: Sequence[int] | NDArray[np.integer[Any]],
    at: Sequence[int] = RECALL_AT,
) -> Recall:
    """Compute recall at k in both directions, as clip_benchmark's zeroshot_retrieval does.

    Args:
        images: (I, E) unit rows.
        texts: (T, E) unit rows; one or more captions per image.
        image_of_text: (T,) image index of each caption.
        at: Values of k.

    Raises:
        DataError: shapes disagree, a value is not finite, or an image has no caption.
    """
    image_rows, text_rows = _rows(images, "images"), _rows(texts, "texts")
    caption_image_ids = np.asarray(image_of_text)
    if caption_image_ids.shape != (len(text_rows),):
        raise DataError(
            f"image_of_text has shape {caption_image_ids.shape} for {len(text_rows)} texts"
        )
    if set(caption_image_ids.tolist()) != set(range(len(image_rows))):
        raise DataError("image_of_text must contain every image index, from 0, and no other")
    image_ids = np.arange(len(image_rows))
    caption_ranks = _ranks(image_rows, text_rows, image_ids, caption_image_ids)
    image_ranks = _ranks(text_rows, image_rows, caption_image_ids, image_ids)
    return Recall(
        {k: float(np.mean(caption_ranks < k)) for k in at},
        {k: float(np.mean(image_ranks < k)) for k in at},
    )


def top_k_accuracy(
    images: Embeddings,
    texts: Embeddings,
    targets: Sequence[int] | NDArray[np.integer[Any]],
    at: Sequence[int] = TOP_K,
) -> dict[int, float]:
    """Compute the fraction of images, 0 to 1, whose class is among the k most similar.

    Args:
        images: (I, E) unit rows.
        texts: (K, E) unit rows, one per class.
        targets: (I,) class index of each image.
        at: Values of k.

    Returns:
        Accuracy by k.

    Raises:
        DataError: shapes disagree, or a value is not finite or out of range.
    """
    image_rows, text_rows = _rows(images, "images"), _rows(texts, "texts")
    classes = np.asarray(targets)
    if classes.shape != (len(image_rows),):
        raise DataError(f"targets has shape {classes.shape} for {len(image_rows)} images")
    if classes.size and not 0 <= classes.min() <= classes.max() < len(text_rows):
        raise DataError(f"targets must be between 0 and {len(text_rows) - 1}")
    ranks = _ranks(image_rows, text_rows, classes, np.arange(len(text_rows)))
    return {k: float(np.mean(ranks < k)) for k in at}


def _rows(values: Embeddings, name: str) -> NDArray[np.float32]:
    if isinstance(values, mx.array):
        values = values.astype(mx.float32)  # numpy has no bfloat16
    rows = np.asarray(values, np.float32)
    if rows.ndim != 2 or not rows.size:
        raise DataError(f"{name} has shape {rows.shape}; expected one row per item, (N, E)")
    if not np.isfinite(rows).all():
        raise DataError(f"{name} contains values that are not finite; embed again in float32")
    return rows


def _ranks(
    queries: NDArray[np.float32],
    candidates: NDArray[np.float32],
    query_group: NDArray[Any],
    candidate_group: NDArray[Any],
) -> NDArray[np.int64]:
    """Rank of the best correct candidate of each query, from 0, (Q,).

    Args:
        queries: (Q, E).
        candidates: (C, E).
        query_group: (Q,) group whose candidates are correct for each query.
        candidate_group: (C,) group of each candidate.
    """
    if queries.shape[1] != candidates.shape[1]:
        raise DataError(
            f"images and texts have {queries.shape[1]} and {candidates.shape[1]} dimensions; "
            "embed both with the same model"
        )
    order = np.arange(len(candidates))
    ranks = np.empty(len(queries), np.int64)
    for start in range(0, len(queries), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        scores = queries[rows] @ candidates.T
        correct = np.where(candidate_group[None, :] == query_group[rows, None], scores, -np.inf)
        first = correct.argmax(axis=1)[:, None]
        best = np.take_along_axis(correct, first, axis=1)
        before = (scores > best) | ((scores == best) & (order[None, :] < first))
        ranks[rows] = before.sum(axis=1)
    return ranks
