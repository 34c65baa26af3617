"""Read the data sets of the published evaluations from local copies."""

import json
from collections.abc import Callable
from pathlib import Path

from ..embedding.files import find_images
from ..errors import DataError, name_some
from ..json_fields import read_bounded
from .zero_shot import imagenet_wordnet_ids

CAPTIONS_PER_IMAGE = 5  # as in clip_benchmark; a few COCO images have six or seven
MAX_CAPTIONS_BYTES = 512 << 20


def imagenet_images(directory: Path) -> tuple[list[str], list[int]]:
    """List images of ImageNet and their classes.

    Args:
        directory: One subdirectory per class, all named by WordNet id, or all by class index, 0
            to 999, as in ImageNet-V2. Classes may be missing.

    Returns:
        Paths of the images, and the class index of each, 0 to 999.

    Raises:
        DataError: a subdirectory has another name, or contains no image.
    """
    folders = _class_folders(directory)
    ids = {name: index for index, name in enumerate(imagenet_wordnet_ids())}
    numbers = {str(index): index for index in range(len(ids))}
    index_by_name = ids if folders[0].name in ids else numbers
    if unknown := [folder.name for folder in folders if folder.name not in index_by_name]:
        raise DataError(
            f"{directory}: {name_some(unknown)}: not an ImageNet class; name all directories by "
            "WordNet id, such as n01440764, or all by a number from 0 to 999; for your own classes "
            "use --classes-from-folders"
        )
    return _images(
        sorted(folders, key=lambda p: index_by_name[p.name]), lambda p: index_by_name[p.name]
    )


def folder_classes(directory: Path) -> tuple[list[str], list[int], list[str]]:
    """List images of a directory with one subdirectory per class, named by the label.

    Returns:
        Paths of the images, the class index of each, and the sorted labels.

    Raises:
        DataError: there is no subdirectory, or one contains no image.
    """
    folders = _class_folders(directory)
    labels = [folder.name for folder in folders]
    index_by_label = {label: index for index, label in enumerate(labels)}
    return *_images(folders, lambda p: index_by_label[p.name]), labels


def _class_folders(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise DataError(f"{directory}: no such directory; give one with a subdirectory per class")
    try:
        folders = [p for p in directory.iterdir() if p.is_dir() and not p.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{directory}: cannot be read ({error.strerror or error})") from error
    if not folders:
        raise DataError(f"{directory}: contains no directories; sort the images into one per class")
    return sorted(folders)


def _images(folders: list[Path], index_of: Callable[[Path], int]) -> tuple[list[str], list[int]]:
    paths, targets = [], []
    for folder in folders:
        files = find_images(str(folder))
        paths += files
        targets += [index_of(folder)] * len(files)
    return paths, targets


def karpathy_test(captions: Path, images: Path) -> tuple[list[str], list[str], list[int]]:
    """Read Karpathy's test split of COCO (5000 images) or Flickr30k (1000 images).

    Args:
        captions: Karpathy's JSON file: `images`, each with `split`, `filename`, optionally
            `filepath`, and `sentences` with `raw` text.
        images: Directory of the images, with or without the subdirectories of `filepath`.

    Returns:
        Paths of the images, captions (at most five per image), and the image index of each
        caption.

    Raises:
        ConfigError: the file is not a regular file, or larger than 512 MB.
        DataError: the file has another format, or an image is missing.
    """
    try:
        data = read_bounded(captions, MAX_CAPTIONS_BYTES, follow_links=True)
        entries = [e for e in json.loads(data)["images"] if e["split"] == "test"]
        texts = [[s["raw"] for s in e["sentences"]][:CAPTIONS_PER_IMAGE] for e in entries]
        files = [_image_file(images, e.get("filepath", ""), e["filename"]) for e in entries]
    except OSError as error:
        raise DataError(f"{captions}: cannot be read ({error.strerror or error})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{captions}: not in Karpathy's format ({type(error).__name__}: {error}); expected "
            "dataset_coco.json or dataset_flickr30k.json"
        ) from error
    if not files:
        raise DataError(f"{captions}: has no test split")
    image_of_text = [index for index, group in enumerate(texts) for _ in group]
    return files, [text for group in texts for text in group], image_of_text


def _image_file(directory: Path, folder: str, name: str) -> str:
    for path in (directory / folder / name, directory / name):
        if path.is_file():
            return str(path)
    raise DataError(f"{directory}: {name[:200]} is missing; give the directory of the images")
