"""The published zero-shot evaluations: ImageNet-1k, and retrieval on COCO and Flickr30k.

An unreadable image is an error, because a result on fewer images would not be comparable with
the published one.
"""

from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..embedding.pipeline import Embedded, iter_embeddings, iter_text_embeddings, text_tower
from ..embedding.progress import consume
from ..errors import DataError
from ..models.clip import MobileCLIP
from ..preprocess.processor import Processor
from ..terminal import Bar
from .metrics import recall, top_k_accuracy


def evaluate_imagenet(
    model: MobileCLIP,
    processor: Processor,
    paths: Sequence[str],
    targets: Sequence[int],
    texts: mx.array,
    *,
    batch_size: int = 32,
    quiet: bool = True,
) -> dict[str, Any]:
    """Measure the accuracy of zero-shot classification.

    Args:
        model: Model with both towers.
        processor: The model's processor.
        paths: N images.
        targets: (N,) class index of each image.
        texts: (K, E) class embeddings from `zero_shot.build_zero_shot_classifier`.
        batch_size: Images per forward pass.
        quiet: Do not show progress.

    Returns:
        `images`: N; `top1` and `top5`: accuracy in percent.

    Raises:
        DataError: an image cannot be embedded.
    """
    iterate = partial(iter_embeddings, model, processor, batch_size=batch_size)
    rows = _embed_all(iterate, paths, "images", batch_size, quiet)
    accuracy = top_k_accuracy(rows, texts, targets)
    return {"images": len(paths)} | {f"top{k}": 100 * share for k, share in accuracy.items()}


def evaluate_retrieval(
    model: MobileCLIP,
    processor: Processor,
    paths: Sequence[str],
    captions: Sequence[str],
    image_of_text: Sequence[int],
    *,
    batch_size: int = 32,
    quiet: bool = True,
) -> dict[str, Any]:
    """Measure retrieval between images and captions, in both directions.

    Args:
        model: Model with both towers.
        processor: The model's processor.
        paths: N images.
        captions: T captions.
        image_of_text: (T,) image index of each caption.
        batch_size: Images or captions per forward pass.
        quiet: Do not show progress.

    Returns:
        `images`: N; `captions`: T; `image_to_text_r<k>` and `text_to_image_r<k>`: recall at k in
        percent.

    Raises:
        DataError: an image or a caption cannot be embedded.
        ModelError: the model has no text tower.
    """
    text_tower(model)  # raises before any image is embedded
    iterate = partial(iter_embeddings, model, processor, batch_size=batch_size)
    images = _embed_all(iterate, paths, "images", batch_size, quiet)
    iterate = partial(iter_text_embeddings, model, processor, batch_size=batch_size)
    texts = _embed_all(iterate, captions, "texts", batch_size, quiet)
    result = recall(images, texts, image_of_text)
    return {
        "images": len(paths),
        "captions": len(captions),
        **{f"image_to_text_r{k}": 100 * share for k, share in result.image_to_text.items()},
        **{f"text_to_image_r{k}": 100 * share for k, share in result.text_to_image.items()},
    }


def _embed_all(
    iterate: Callable[[list[str]], Generator[Embedded, None, None]],
    names: Sequence[str],
    unit: str,
    batch_size: int,
    quiet: bool,
) -> NDArray[np.float32]:
    """Return the embeddings (N, E) of all names; each distinct name is embedded once."""
    rows: dict[str, NDArray[np.float32]] = {}

    def store(embedded: list[str], embeddings: NDArray[np.float32]) -> None:
        rows.update(zip(embedded, embeddings, strict=True))

    distinct = list(dict.fromkeys(names))
    with Bar(len(distinct), unit, quiet=quiet) as bar:
        errors = consume(iterate(distinct), batch_size, bar, store)
    if not rows:
        raise DataError(f"none of the {len(names)} {unit} could be embedded")
    if errors:
        raise DataError(
            f"{len(errors)} of {len(names)} {unit} cannot be used, so the result "
            "would not be comparable; fix the files named above"
        )
    return np.stack([rows[name] for name in names])
