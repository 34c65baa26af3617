"""Run the published zero-shot evaluations: ImageNet-1k, and retrieval on COCO and Flickr30k.

The data sets are the user's own copies. Every image counts: one that cannot be read ends the
evaluation, for a figure over fewer images would not be the published one.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from .clip import MobileCLIP
from .embed import embed_images, embed_texts, find_images
from .errors import DataError
from .processor import Processor
from .retrieval import recall, top_k_accuracy
from .zeroshot import imagenet_classes, text_tower

CAPTIONS_PER_IMAGE = 5  # as clip_benchmark takes them; a few COCO images have six or seven
MAX_CAPTIONS_BYTES = 512 << 20


def imagenet_images(directory: Path) -> tuple[list[str], list[int]]:
    """The validation images and their classes.

    Args:
        directory: Holds 1000 directories in the order of the classes: by name, as WordNet ids
            are, or by number, as in ImageNet-V2.

    Raises:
        DataError: there are not 1000 directories, or one holds no image.
    """
    if not directory.is_dir():
        raise DataError(f"{directory}: no such directory; give ImageNet's validation images")
    found = (p for p in directory.iterdir() if p.is_dir() and not p.name.startswith("."))
    folders = sorted(found, key=lambda p: (int(p.name) if p.name.isdecimal() else 0, p.name))
    classes = len(imagenet_classes())
    if len(folders) != classes:
        raise DataError(
            f"{directory}: holds {len(folders)} directories instead of {classes}; sort the "
            "validation images into one directory for each class, named by its WordNet id"
        )
    paths, targets = [], []
    for index, folder in enumerate(folders):
        files = find_images(str(folder))
        paths += files
        targets += [index] * len(files)
    return paths, targets


def karpathy_test(captions: Path, images: Path) -> tuple[list[str], list[str], list[int]]:
    """The test split that COCO 5k and Flickr 1k stand for.

    Args:
        captions: Karpathy's JSON file: `images`, each with `split`, `filename`, perhaps
            `filepath`, and `sentences` with `raw` text.
        images: Directory with the images, in subdirectories as in the file or all in one.

    Returns:
        Paths of the images, captions (five of each image), and the captions' image indices.

    Raises:
        DataError: the file is not of that form, or an image is missing.
    """
    try:
        if captions.stat().st_size > MAX_CAPTIONS_BYTES:
            raise DataError(f"{captions}: larger than {MAX_CAPTIONS_BYTES >> 20} MB")
        entries = [e for e in json.loads(captions.read_bytes())["images"] if e["split"] == "test"]
        texts = [[s["raw"] for s in e["sentences"]][:CAPTIONS_PER_IMAGE] for e in entries]
        files = [_image_file(images, e.get("filepath", ""), e["filename"]) for e in entries]
    except OSError as error:
        raise DataError(f"{captions}: cannot be read ({error.strerror or error})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{captions}: not Karpathy's form ({type(error).__name__}: {error}); expected "
            "dataset_coco.json or dataset_flickr30k.json"
        ) from error
    if not files:
        raise DataError(f"{captions}: has no test split")
    owners = [index for index, group in enumerate(texts) for _ in group]
    return files, [text for group in texts for text in group], owners


def _image_file(directory: Path, folder: str, name: str) -> str:
    for path in (directory / folder / name, directory / name):
        if path.is_file():
            return str(path)
    raise DataError(f"{directory}: {name[:200]} is missing; give the directory of the images")


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
    """Zero-shot accuracy in percent.

    Args:
        model: Model with both towers.
        processor: The model's processor.
        paths: N images.
        targets: Their classes.
        texts: The classes' matrix from `zeroshot.text_matrix`.
        batch_size: Images that go through the model at once.
        quiet: No progress.
    """
    rows = _image_rows(model, processor, paths, batch_size, quiet)
    accuracy = top_k_accuracy(rows, texts, targets)
    return {"images": len(paths)} | {f"top{k}": 100 * share for k, share in accuracy.items()}


def evaluate_retrieval(
    model: MobileCLIP,
    processor: Processor,
    paths: Sequence[str],
    captions: Sequence[str],
    owners: Sequence[int],
    *,
    batch_size: int = 32,
    quiet: bool = True,
) -> dict[str, Any]:
    """Recall in percent, in both directions.

    Args:
        model: Model with both towers.
        processor: The model's processor.
        paths: N images.
        captions: Their captions.
        owners: The index of each caption's image.
        batch_size: Images or captions that go through the model at once.
        quiet: No progress.
    """
    text_tower(model)  # before the images: without one their work would be lost
    images = _image_rows(model, processor, paths, batch_size, quiet)
    with TemporaryDirectory() as directory:
        output = Path(directory, "texts.safetensors")
        embed_texts(model, processor, captions, output, batch_size=batch_size, quiet=quiet)
        found = recall(images, load_file(output)["embeddings"], owners)
    return {
        "images": len(paths),
        "captions": len(captions),
        **{f"image_to_text_r{k}": 100 * share for k, share in found.image_to_text.items()},
        **{f"text_to_image_r{k}": 100 * share for k, share in found.text_to_image.items()},
    }


def _image_rows(
    model: MobileCLIP, processor: Processor, paths: Sequence[str], batch_size: int, quiet: bool
) -> NDArray[np.float32]:
    with TemporaryDirectory() as directory:
        output = Path(directory, "images.safetensors")
        summary = embed_images(model, processor, paths, output, batch_size=batch_size, quiet=quiet)
        if summary.skipped:
            raise DataError(
                f"{len(summary.skipped)} of {summary.total} images cannot be used, so the figure "
                "would not be comparable; mend the files named above"
            )
        rows: NDArray[np.float32] = load_file(output)["embeddings"]
    return rows
