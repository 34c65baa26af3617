"""Zero-shot classification: find the label whose text embedding is nearest to the image.

Each label is inserted into every template of a set; the embeddings of its prompts are normalised,
averaged and normalised again, as in the published evaluation (open_clip 3.3.0,
zero_shot_classifier.py).
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from numbers import Integral
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..caching.disk_cache import DiskCache
from ..embedding.identity import text_identity
from ..embedding.pipeline import check_batch_size, is_unicode, text_tower
from ..errors import DataError, ImageError, ModelError
from ..models.clip import MobileCLIP
from ..preprocess.image import ImageSource
from ..preprocess.processor import Processor

PLAIN_TEMPLATE = ("a photo of a {}.",)
TEMPLATE_SETS = ("openai", "simple")
PROMPTS_PER_BATCH = 128
MAX_LOGIT_SCALE = 100.0  # clipped as in training
CACHE_FORMAT = 2


@dataclass(frozen=True, slots=True)
class Prediction:
    """A label predicted for an image.

    Attributes:
        label: The label as given.
        index: Index in the list of labels, from 0.
        probability: Softmax of the scaled similarities over all labels, 0 to 1.
        similarity: Cosine similarity of image and label, -1 to 1.
    """

    label: str
    index: int
    probability: float
    similarity: float


def imagenet_classes() -> tuple[str, ...]:
    """OpenAI's names of the 1000 ImageNet classes, in the order of the sorted WordNet ids."""
    return tuple(_read_data("imagenet_classes.json")["classes"])


def imagenet_wordnet_ids() -> tuple[str, ...]:
    """The WordNet ids of the 1000 ImageNet classes, sorted."""
    return tuple(_read_data("imagenet_wordnet_ids.json")["ids"])


def template_set(name: str) -> tuple[str, ...]:
    """Return a published set of prompt templates, in which `{}` stands for the label.

    Args:
        name: "openai" (80 templates) or "simple" (7).

    Raises:
        DataError: there is no such set.
    """
    if name not in TEMPLATE_SETS:
        raise DataError(f"unknown templates {name!r}; choose {' or '.join(TEMPLATE_SETS)}")
    return tuple(_read_data("imagenet_templates.json")[name])


def _read_data(name: str) -> dict[str, Any]:
    file = resources.files("mlx_mobileclip").joinpath("data", name)
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return values


def build_zero_shot_classifier(
    model: MobileCLIP,
    processor: Processor,
    labels: Sequence[str],
    templates: Sequence[str] = PLAIN_TEMPLATE,
    *,
    cache: bool = True,
    on_progress: Callable[[int], None] | None = None,
) -> mx.array:
    """Embed each label, averaged over the templates.

    Args:
        model: Model with a text tower.
        processor: The model's processor.
        labels: K labels.
        templates: Prompts in which `{}` stands for the label.
        cache: Cache the result on disk, to reuse it for the same text tower, tokenizer, labels and
            templates.
        on_progress: Called with the number of labels just embedded.

    Returns:
        float32 (K, E), unit rows.

    Raises:
        DataError: no labels, no templates, or a template without `{}`.
        ModelError: the model has no text tower, or an embedding is not finite.
    """
    _check_texts(labels, "labels")
    _check_texts(templates, "templates")
    for template in templates:
        if "{}" not in template:
            raise DataError(f'template {template!r} has no {{}}; write "a photo of a {{}}."')
    text_tower(model)
    directory = cache_directory() if cache else None
    disk_cache = None if directory is None else DiskCache(directory)
    key = _cache_key(model, processor, labels, templates) if disk_cache else ""
    columns = model.config.embed_dim
    if disk_cache and (cached := disk_cache.read(key, len(labels), columns, unit=True)) is not None:
        _warn_of_truncation(processor, labels, templates)
        return mx.array(cached)
    step = max(1, PROMPTS_PER_BATCH // len(templates))
    rows = []
    for start in range(0, len(labels), step):
        group = labels[start : start + step]
        rows.append(_embed_labels(model, processor, group, templates))
        mx.eval(rows[-1])
        if on_progress:
            on_progress(len(group))
    matrix = mx.concatenate(rows)
    if not mx.isfinite(matrix.sum()).item():
        raise ModelError("the labels' embeddings are not finite; try --dtype float32")
    if disk_cache:
        disk_cache.write(key, np.asarray(matrix))
    return matrix


def _check_texts(texts: Sequence[str], what: str) -> None:
    if not isinstance(texts, (list, tuple)) or not texts:
        raise DataError(f"there are no {what}; give at least one, as a list")
    for text in texts:
        if not isinstance(text, str) or not is_unicode(text):
            raise DataError(f"{text!r} among the {what} is not UTF-8 text")


def _warn_of_truncation(
    processor: Processor, labels: Sequence[str], templates: Sequence[str]
) -> None:
    """Repeat the warning about truncated prompts, which tokenising would have given."""
    prompts = (prompt for label in labels for prompt in _prompts(label, templates))
    long_prompts = [prompt for prompt in prompts if processor.tokenizer.may_be_truncated(prompt)]
    if long_prompts:
        processor.texts(long_prompts)


def _prompts(label: str, templates: Sequence[str]) -> list[str]:
    # Not str.format, because a label or template may contain other braces.
    return [template.replace("{}", label) for template in templates]


def _embed_labels(
    model: MobileCLIP, processor: Processor, labels: Sequence[str], templates: Sequence[str]
) -> mx.array:
    prompts = [prompt for label in labels for prompt in _prompts(label, templates)]
    parts = [
        model.encode_text(
            processor.texts(prompts[start : start + PROMPTS_PER_BATCH]), normalize=True
        ).astype(mx.float32)
        for start in range(0, len(prompts), PROMPTS_PER_BATCH)
    ]
    embeddings = mx.concatenate(parts).reshape(len(labels), len(templates), -1)
    mean = embeddings.mean(axis=1)
    return mean / mx.linalg.norm(mean, axis=-1, keepdims=True)


def cache_directory() -> Path | None:
    """Directory of cached classifiers: $MLX_MOBILECLIP_CACHE, or in the user's cache directory.

    None if the user has no home directory.
    """
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    chosen = os.environ.get("MLX_MOBILECLIP_CACHE") or f"{home}/mlx-mobileclip"
    try:
        return Path(chosen).expanduser()
    except RuntimeError:
        return None


def _cache_key(
    model: MobileCLIP, processor: Processor, labels: Sequence[str], templates: Sequence[str]
) -> str:
    content = [CACHE_FORMAT, text_identity(model, processor), list(templates), list(labels)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def classify(
    model: MobileCLIP,
    processor: Processor,
    images: Sequence[ImageSource],
    labels: Sequence[str],
    *,
    templates: Sequence[str] = PLAIN_TEMPLATE,
    classifier: mx.array | None = None,
    top_k: int = 5,
    batch_size: int = 32,
    cache: bool = True,
) -> list[list[Prediction]]:
    """Find the most similar labels of each image.

    Args:
        model: Model with both towers.
        processor: The model's processor.
        images: Paths, bytes, PIL images or arrays.
        labels: K labels to choose from.
        templates: Prompts in which `{}` stands for the label.
        classifier: Label embeddings (K, E) from `build_zero_shot_classifier`; computed if not
            given.
        top_k: Number of labels to return per image, at most K.
        batch_size: Images per forward pass.
        cache: Cache the label embeddings on disk.

    Returns:
        The best labels of each image, most probable first; ties in the order of the labels.

    Raises:
        DataError: labels or templates cannot be used, or top_k is below 1.
        ImageError: an image cannot be read.
        ModelError: an embedding is not finite.
    """
    check_batch_size(batch_size)
    if not isinstance(top_k, Integral) or top_k < 1:
        raise DataError(f"top_k is {top_k!r:.40}; ask for at least 1 label")
    if classifier is None:
        classifier = build_zero_shot_classifier(model, processor, labels, templates, cache=cache)
    classifier = check_classifier(classifier, labels)
    # Refuses sets, for example, which have no order.
    if not isinstance(images, (Sequence, np.ndarray, mx.array)):
        raise ImageError(f"images takes a list of images, not a {type(images).__name__}")
    results = []
    for start in range(0, len(images), batch_size):
        pixels = processor.images(images[start : start + batch_size])
        embeddings = model.encode_image(pixels, normalize=True)
        results += predict(model, embeddings, classifier, labels, top_k)
    return results


def check_classifier(classifier: mx.array, labels: Sequence[str]) -> mx.array:
    """Convert a classifier (K, E) to an MLX array; DataError unless K is the number of labels."""
    classifier = mx.array(classifier)
    if classifier.ndim != 2 or classifier.shape[0] != len(labels):
        shape = classifier.shape
        raise DataError(f"classifier has shape {shape}, but there are {len(labels)} labels")
    return classifier


def predict(
    model: MobileCLIP,
    embeddings: mx.array,
    classifier: mx.array,
    labels: Sequence[str],
    top_k: int,
) -> list[list[Prediction]]:
    """Return the best labels of each image, as `classify` does.

    Args:
        model: Model with a text tower.
        embeddings: Image embeddings (N, E), unit rows.
        classifier: Label embeddings (K, E), unit rows.
        labels: The K labels.
        top_k: Number of labels to return per image.

    Raises:
        ModelError: the model has no text tower, or an embedding is not finite.
    """
    _, logit_scale = text_tower(model)
    scale = mx.minimum(mx.exp(logit_scale.astype(mx.float32)), MAX_LOGIT_SCALE)
    similarities = embeddings.astype(mx.float32) @ classifier.T
    probabilities = mx.softmax(scale * similarities, axis=-1)
    rows = zip(np.asarray(similarities), np.asarray(probabilities), strict=True)
    return [
        _top_labels(labels, row_similarities, row_probabilities, top_k)
        for row_similarities, row_probabilities in rows
    ]


def _top_labels(
    labels: Sequence[str], similarities: NDArray[Any], probabilities: NDArray[Any], top_k: int
) -> list[Prediction]:
    if not np.isfinite(probabilities).all():
        raise ModelError("an image's embedding is not finite; try --dtype float32")
    best = np.argsort(-similarities, kind="stable")[:top_k]
    return [
        Prediction(labels[i], int(i), float(probabilities[i]), float(similarities[i])) for i in best
    ]
