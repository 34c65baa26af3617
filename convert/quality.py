"""What quantising costs: the packed model against the original on calibration pictures."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fastvlm.config import FastVLMConfig

from .calibration import Sample
from .quantize import Tensors
from .walk import IMAGES, LOGITS, TEXTS, Read, Walk


@dataclass(frozen=True)
class Size:
    """What the packed model takes; `per_token_bytes` are read for each token of an answer."""

    bits_per_weight: float
    disk_bytes: int
    per_token_bytes: int


def size(weights: int, stored: Tensors, config: Any) -> Size:
    """Size of a checkpoint that has so many weights and is stored in these tensors."""
    disk = sum(tensor.nbytes for tensor in stored.values())
    # A tied embedding is the output layer as well, and so is read whole for each token.
    tied = isinstance(config, FastVLMConfig) and config.text.tie_word_embeddings
    skipped = () if tied else ("language_model.embed_tokens.",)
    read = sum(
        tensor.nbytes
        for name, tensor in stored.items()
        if name.startswith("language_model.") and not name.startswith(skipped)
    )
    return Size(8 * disk / weights, disk, read)


@dataclass(frozen=True)
class Agreement:
    """How far a packed FastVLM's next-token distributions are from the original's.

    Attributes:
        kl: Mean Kullback-Leibler divergence from the original, nats.
        top_1: Share of positions where both find the same token likeliest.
        positions: How many were compared.
    """

    kl: float
    top_1: float
    positions: int


def agreement(walk: Walk, original: Read, packed: Read, samples: list[Sample]) -> Agreement:
    """Compare two checkpoints of one model on every token after the image, answers included."""
    divergences, same = [], []
    theirs = [seen.value for seen in walk(original, {}, samples) if seen.stage == LOGITS]
    ours = (seen.value for seen in walk(packed, {}, samples) if seen.stage == LOGITS)
    for reference, found in zip(theirs, ours, strict=True):
        divergences.append(divergence(reference, found))
        same.append(mx.argmax(reference, axis=-1) == mx.argmax(found, axis=-1))
    kl, agreeing = np.array(mx.concatenate(divergences)), np.array(mx.concatenate(same))
    return Agreement(float(kl.mean()), float(agreeing.mean()), len(kl))


def divergence(reference: mx.array, found: mx.array) -> mx.array:
    """Kullback-Leibler divergence, nats (L,), of log-probabilities (L, V)."""
    return mx.sum(mx.exp(reference) * (reference - found), axis=-1)


@dataclass(frozen=True)
class Closeness:
    """How far a packed MobileCLIP's embeddings are from the original's.

    Attributes:
        image: Mean cosine of the two embeddings of an image.
        text: The same of a label; None, as the next, if there is no text tower.
        top_1: Share of images for which both find the same label likeliest.
    """

    image: float
    text: float | None
    top_1: float | None


def closeness(walk: Walk, original: Read, packed: Read, samples: list[Sample]) -> Closeness:
    """Compare two checkpoints of one MobileCLIP."""
    (images, texts), (our_images, our_texts) = (
        _embeddings(walk, read, samples) for read in (original, packed)
    )
    image = _mean(mx.sum(images * our_images, axis=-1))
    if texts is None or our_texts is None:
        return Closeness(image, None, None)
    same = mx.argmax(images @ texts.T, axis=-1) == mx.argmax(our_images @ our_texts.T, axis=-1)
    return Closeness(image, _mean(mx.sum(texts * our_texts, axis=-1)), _mean(same))


def _mean(values: mx.array) -> float:
    return float(np.array(values).mean())


def _embeddings(walk: Walk, read: Read, samples: list[Sample]) -> tuple[mx.array, mx.array | None]:
    seen = list(walk(read, {}, samples))
    images = mx.concatenate([each.value for each in seen if each.stage == IMAGES])
    texts = [each.value for each in seen if each.stage == TEXTS]
    return images, texts[0] if texts else None
