"""The loss of multi-modal reinforced training.

The teachers are not run: their embeddings of each augmented image and each caption are stored with
the data (see reinforced_data.py). Source: arXiv:2311.17049, section 3.2; apple/ml-mobileclip
e15d36e, `training/open_clip_v2.patch`, DRClipLoss with average_after_softmax.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..errors import DataError


@dataclass(frozen=True, slots=True)
class Captions:
    """Embeddings of one caption per image: ground truth, or sampled from the synthetic ones.

    Attributes:
        texts: Student embeddings, unit rows (B, E).
        teacher_texts: Stored teacher embeddings, concatenated (B, D).
    """

    texts: mx.array
    teacher_texts: mx.array


@dataclass(frozen=True, slots=True)
class Teachers:
    """The ensemble of teachers, whose embeddings are concatenated in stored rows.

    Attributes:
        widths: Embedding width of each teacher, D in total; each embedding has unit length.
        scales: Factor on each teacher's cosine similarities before its softmax: 100 and 100 for
            the teachers of MobileCLIP, 70 and 60 for those of MobileCLIP2.
    """

    widths: tuple[int, ...] = (768, 768)
    scales: tuple[float, ...] = (100.0, 100.0)


def reinforced_loss(
    images: mx.array,
    captions: Sequence[Captions],
    teacher_images: mx.array,
    logit_scale: mx.array,
    *,
    teachers: Teachers | None = None,
    weights: tuple[float, float] = (0.0, 1.0),
) -> mx.array:
    """Contrastive loss and distillation from the teachers' similarities, summed over captions.

    For each set of captions the loss is the mean, over image-to-text and text-to-image, of
    `w0 * CE(identity, S) + w1 * CE(P, S)`. `S` is the student's log-softmax over the batch, `P`
    the mean of the teachers' softmaxes, `CE(P, S) = -sum(P * S)` averaged over the batch.

    Args:
        images: Student embeddings, unit rows (B, E).
        captions: Ground-truth captions, synthetic ones, or both, for the same images.
        teacher_images: Teacher embeddings of the augmented images, (B, D).
        logit_scale: Natural logarithm of the student's factor, as `MobileCLIP.logit_scale`.
        teachers: Widths and scales of the teachers; by default two of width 768 and scale 100.
        weights: (w0, w1): (0, 1) for the small models and all 12M runs, (0.25, 0.75) for B on 1B.

    Returns:
        Loss, float32 scalar; differentiable in `images`, `texts` and `logit_scale`.

    Raises:
        DataError: shapes disagree.
    """
    teachers = teachers or Teachers()
    _check(images, captions, teacher_images, teachers)
    factor = mx.exp(logit_scale.astype(mx.float32))
    images = images.astype(mx.float32)
    loss = mx.array(0.0)
    for pair in captions:
        logits = factor * (images @ pair.texts.astype(mx.float32).T)
        for student, (queries, keys) in (
            (logits, (teacher_images, pair.teacher_texts)),
            (logits.T, (pair.teacher_texts, teacher_images)),
        ):
            log_probabilities = student - mx.logsumexp(student, axis=1, keepdims=True)
            target = mx.stop_gradient(_teacher_probabilities(queries, keys, teachers))
            contrastive = -mx.mean(mx.diagonal(log_probabilities))
            distillation = -mx.mean(mx.sum(target * log_probabilities, axis=1))
            loss = loss + (weights[0] * contrastive + weights[1] * distillation) / 2
    return loss


def _teacher_probabilities(queries: mx.array, keys: mx.array, teachers: Teachers) -> mx.array:
    """Softmax of the similarities, averaged over the teachers, (B, B)."""
    probabilities, start = [], 0
    for width, scale in zip(teachers.widths, teachers.scales, strict=True):
        part = slice(start, start + width)
        similarities = queries[:, part].astype(mx.float32) @ keys[:, part].astype(mx.float32).T
        probabilities.append(mx.softmax(scale * similarities, axis=1))
        start += width
    return sum(probabilities[1:], probabilities[0]) / len(probabilities)


def _check(
    images: mx.array, captions: Sequence[Captions], teacher_images: mx.array, teachers: Teachers
) -> None:
    if not teachers.widths or len(teachers.widths) != len(teachers.scales):
        raise DataError(
            f"{len(teachers.widths)} teachers have {len(teachers.scales)} scales; "
            "give each teacher its own"
        )
    if not captions:
        raise DataError("no captions; give the ground-truth ones, synthetic ones, or both")
    stored = (images.shape[0], sum(teachers.widths))
    for name, array, shape in [
        ("teacher_images", teacher_images, stored),
        *[("texts", pair.texts, images.shape) for pair in captions],
        *[("teacher_texts", pair.teacher_texts, stored) for pair in captions],
    ]:
        if array.shape != shape or len(shape) != 2:
            raise DataError(f"{name} has shape {array.shape}; expected {shape}")
