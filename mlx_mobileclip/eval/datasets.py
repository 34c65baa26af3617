"""Read the data sets of the published evaluations from the user's own copies."""

import json
from pathlib import Path

from ..embedding.files import find_images
from ..errors import DataError
from .zero_shot import imagenet_classes

CAPTIONS_PER_IMAGE = 5  # as in clip_benchmark; a few COCO images have six or seven
MAX_CAPTIONS_BYTES = 512 << 20


def imagenet_images(directory: Path) -> tuple[list[str], list[int]]:
    """List ImageNet's validation images and their classes.

    Args:
        directory: Has 1000 subdirectories in the order of the classes: sorted by name if they
            are named by WordNet id, by number if they are numbered, as in ImageNet-V2.

    Returns:
        Paths of the images, and the class index of each, 0 to 999.

    Raises:
        DataError: there are not 1000 subdirectories, or one has no image.
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
    """Read Karpathy's test split of COCO (5000 images) or Flickr30k (1000 images).

    Args:
        captions: Karpathy's JSON file: `images`, each with `split`, `filename`, optionally
            `filepath`, and `sentences` with `raw` text.
        images: Directory of the images, in the file's subdirectories or without any.

    Returns:
        Paths of the images, captions (five per image), and the image index of each caption.

    Raises:
        DataError: the file does not have this form, or an image is missing.
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
