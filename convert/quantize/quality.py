"""Quality of a quantised model: its outputs compared with the original's on samples."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fastvlm.models.config import FastVLMConfig
from mlx_mobileclip.checkpoints.source import Tensors

from ..calibration import Sample
from ..verify.stages import IMAGES, LOGITS, TEXTS, Read, RunStages


@dataclass(frozen=True)
class Size:
    """Size of a checkpoint.

    Attributes:
        bits_per_weight: Bits on disk for each weight of the model, scales included.
        disk_bytes: Bytes of all tensors.
        per_token_bytes: Bytes that are read for each generated token; 0 for MobileCLIP.
    """

    bits_per_weight: float
    disk_bytes: int
    per_token_bytes: int


def checkpoint_size(weights: int, stored: Tensors, config: Any) -> Size:
    """Size of a checkpoint.

    Args:
        weights: Number of weights of the model.
        stored: Canonical tensors as stored; not evaluated.
        config: Config of the model.
    """
    disk = sum(tensor.nbytes for tensor in stored.values())
    # A tied embedding is also the output layer, which is read in full for each token.
    tied = isinstance(config, FastVLMConfig) and config.text.tie_word_embeddings
    skipped = () if tied else ("language_model.embed_tokens.",)
    per_token = sum(
        tensor.nbytes
        for name, tensor in stored.items()
        if name.startswith("language_model.") and not name.startswith(skipped)
    )
    return Size(8 * disk / weights, disk, per_token)


@dataclass(frozen=True)
class Agreement:
    """Next-token distributions of a quantised FastVLM, compared with the original's.

    Attributes:
        kl: Mean Kullback-Leibler divergence from the original, nats.
        top_1: Share of positions with the same most likely token.
        positions: Number of positions compared.
    """

    kl: float
    top_1: float
    positions: int


def agreement(
    run_stages: RunStages, original: Read, quantized: Read, samples: list[Sample]
) -> Agreement:
    """Compare two checkpoints of a FastVLM on every token after the image.

    Args:
        run_stages: Runs a FastVLM.
        original: Reads the source.
        quantized: Reads the quantised checkpoint.
        samples: Images with a question and an answer.
    """
    divergences, same = [], []
    # Keep the logits of only one model in memory.
    expected = [out.value for out in run_stages(original, {}, samples) if out.stage == LOGITS]
    actual = (out.value for out in run_stages(quantized, {}, samples) if out.stage == LOGITS)
    for reference, logits in zip(expected, actual, strict=True):
        divergences.append(divergence(reference, logits))
        same.append(mx.argmax(reference, axis=-1) == mx.argmax(logits, axis=-1))
    kl, agrees = np.array(mx.concatenate(divergences)), np.array(mx.concatenate(same))
    return Agreement(float(kl.mean()), float(agrees.mean()), len(kl))


def divergence(reference: mx.array, actual: mx.array) -> mx.array:
    """Kullback-Leibler divergence (L,) in nats, of log-probabilities (L, V)."""
    return mx.sum(mx.exp(reference) * (reference - actual), axis=-1)


@dataclass(frozen=True)
class Similarity:
    """Embeddings of a quantised MobileCLIP, compared with the original's.

    Attributes:
        image: Mean cosine of the two embeddings of an image.
        text: Mean cosine of the two embeddings of a label; None without a text tower.
        top_1: Share of images with the same most likely label; None without a text tower.
    """

    image: float
    text: float | None
    top_1: float | None


def similarity(
    run_stages: RunStages, original: Read, quantized: Read, samples: list[Sample]
) -> Similarity:
    """Compare two checkpoints of a MobileCLIP on images, and on labels if it has a text tower.

    Args:
        run_stages: Runs a MobileCLIP.
        original: Reads the source.
        quantized: Reads the quantised checkpoint.
        samples: Calibration samples; only their images are used.
    """
    (images, texts), (other_images, other_texts) = (
        _embeddings(run_stages, read, samples) for read in (original, quantized)
    )
    image = _mean(mx.sum(images * other_images, axis=-1))
    if texts is None or other_texts is None:
        return Similarity(image, None, None)
    same = mx.argmax(images @ texts.T, axis=-1) == mx.argmax(other_images @ other_texts.T, axis=-1)
    return Similarity(image, _mean(mx.sum(texts * other_texts, axis=-1)), _mean(same))


def _mean(values: mx.array) -> float:
    return float(np.array(values).mean())


def _embeddings(
    run_stages: RunStages, read: Read, samples: list[Sample]
) -> tuple[mx.array, mx.array | None]:
    """Unit embeddings (N, D) of the images, and of LABELS."""
    outputs = list(run_stages(read, {}, samples))
    images = mx.concatenate([out.value for out in outputs if out.stage == IMAGES])
    texts = [out.value for out in outputs if out.stage == TEXTS]
    return images, texts[0] if texts else None
