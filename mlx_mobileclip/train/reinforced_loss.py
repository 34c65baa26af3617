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
    """One caption for each image of a batch: the true ones, or one draw of the synthetic ones.

    Attributes:
        texts: The student's embeddings, unit rows (B, E).
        teacher_texts: The teachers' stored embeddings, concatenated (B, D).
    """

    texts: mx.array
    teacher_texts: mx.array


@dataclass(frozen=True, slots=True)
class Teachers:
    """The ensemble of teachers, whose embeddings are concatenated in each stored row.

    Attributes:
        widths: Embedding width of each teacher, D in total; each embedding has length 1.
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

    For each set of captions the loss is the mean, over images to texts and texts to images, of
    `w0 * CE(identity, S) + w1 * CE(P, S)`. `S` is the student's log-softmax over the batch, `P`
    the mean of the teachers' softmaxes, `CE(P, S) = -sum(P * S)` averaged over the batch.

    Args:
        images: The student's embeddings, unit rows (B, E).
        captions: The true captions, the synthetic ones, or both; they share the images.
        teacher_images: The teachers' embeddings of the images as augmented, (B, D).
        logit_scale: Natural logarithm of the student's factor, as `MobileCLIP.logit_scale`.
        teachers: How the teachers' rows are split; by default two of 768 at a scale of 100.
        weights: (w0, w1): (0, 1) for the small models and all 12M runs, (0.25, 0.75) for B on 1B.

    Returns:
        The loss, float32 scalar; differentiable in `images`, `texts` and `logit_scale`.

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
            log_share = student - mx.logsumexp(student, axis=1, keepdims=True)
            target = mx.stop_gradient(_teacher_shares(queries, keys, teachers))
            contrastive = -mx.mean(mx.diagonal(log_share))
            distilled = -mx.mean(mx.sum(target * log_share, axis=1))
            loss = loss + (weights[0] * contrastive + weights[1] * distilled) / 2
    return loss


def _teacher_shares(queries: mx.array, keys: mx.array, teachers: Teachers) -> mx.array:
    """Mean over the teachers of the softmax of their similarities, (B, B)."""
    shares, start = [], 0
    for width, scale in zip(teachers.widths, teachers.scales, strict=True):
        part = slice(start, start + width)
        similarities = queries[:, part].astype(mx.float32) @ keys[:, part].astype(mx.float32).T
        shares.append(mx.softmax(scale * similarities, axis=1))
        start += width
    return sum(shares[1:], shares[0]) / len(shares)


def _check(
    images: mx.array, captions: Sequence[Captions], teacher_images: mx.array, teachers: Teachers
) -> None:
    if not teachers.widths or len(teachers.widths) != len(teachers.scales):
        raise DataError(
            f"{len(teachers.widths)} teachers have {len(teachers.scales)} scales; "
            "give each teacher its own"
        )
    if not captions:
        raise DataError("there are no captions; give the true ones, the synthetic ones, or both")
    stored = (images.shape[0], sum(teachers.widths))
    for name, array, shape in [
        ("teacher_images", teacher_images, stored),
        *[("texts", pair.texts, images.shape) for pair in captions],
        *[("teacher_texts", pair.teacher_texts, stored) for pair in captions],
    ]:
        if array.shape != shape or len(shape) != 2:
            raise DataError(f"{name} has shape {array.shape}; expected {shape}")
