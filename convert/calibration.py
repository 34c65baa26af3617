"""Samples to measure a quantised model on: images with a question and an answer.

The default images are generated, so that no data and no licence are needed. Images of the intended
use, given with `--calibration DIR`, are more representative.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mlx_mobileclip.errors import DataError
from mlx_mobileclip.preprocess.image import open_image

MAX_IMAGES = 32
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif"}
# A question and the beginning of an answer. The model reads both, and its distributions of the next
# token are compared at every position.
CONVERSATIONS = (
    ("Describe the image.", "The image shows a colourful scene with several objects in it."),
    ("What is written in the image?", "The text in the image says HELLO and 42."),
    ("How many objects are there?", "There are three objects: a circle, a square and a line."),
    ("What colours do you see?", "Mostly blue and green, with some red near the top left."),
    ("Is there a person in this picture?", "No, there is no person in the picture."),
    ("Write a short caption.", "Shapes and letters on a shaded background."),
    ("What is in the foreground, and what behind it?", "In front there is a bright shape."),
    ("Was ist auf dem Bild zu sehen?", "Auf dem Bild sind ein Kreis und ein Quadrat zu sehen."),
)
LABELS = tuple(
    f"{colour} {thing}"
    for colour in ("red", "green", "blue", "yellow", "black", "white")
    for thing in ("circle", "square", "line", "word", "house", "dog", "car", "tree")
)


@dataclass(frozen=True)
class Sample:
    """An image or its path, a question about it and an answer."""

    image: Image.Image | Path
    question: str
    answer: str


def calibration_samples(directory: Path | None) -> list[Sample]:
    """Return images, each with one of CONVERSATIONS.

    Args:
        directory: Directory of images, of which MAX_IMAGES are used; None for generated ones.

    Raises:
        DataError: the directory does not exist or contains no image.
        ImageError: an image cannot be read.
    """
    images: Sequence[Image.Image | Path] = _find_images(directory) if directory else drawn_images()
    return [Sample(image, *CONVERSATIONS[i % len(CONVERSATIONS)]) for i, image in enumerate(images)]


def _find_images(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise DataError(f"{directory}: is not a directory; give one of images as --calibration")
    candidates = (p for p in directory.iterdir() if p.suffix.lower() in SUFFIXES)
    paths = sorted(p for p in candidates if p.is_file())[:MAX_IMAGES]  # not dangling links
    if not paths:
        raise DataError(f"{directory}: contains no image; give a directory of images")
    for path in paths:
        open_image(path)  # report unreadable images now, but keep only paths, to save memory
    return paths


def drawn_images(count: int = len(CONVERSATIONS)) -> list[Image.Image]:
    """Draw shapes and words on shaded backgrounds with noise, the same on every machine."""
    rng = np.random.default_rng(0)
    return [_draw(rng) for _ in range(count)]


def _draw(rng: np.random.Generator) -> Image.Image:
    width, height = (int(side) for side in rng.integers(300, 500, 2))
    corners = rng.integers(0, 256, (2, 2, 3), np.uint8)
    image = Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(2, 7))):
        x, y, a, b = (int(v) for v in rng.uniform(0, 1, 4) * (width, height, 120, 120))
        colour = tuple(int(v) for v in rng.integers(0, 256, 3))
        box = (x, y, x + a + 10, y + b + 10)
        kind = int(rng.integers(4))
        if kind == 0:
            draw.ellipse(box, fill=colour)
        elif kind == 1:
            draw.rectangle(box, fill=colour)
        elif kind == 2:
            draw.line(box, fill=colour, width=7)
        else:
            words = ("HELLO", "42", "Mac", "open", "EXIT", "2026")
            font = ImageFont.load_default(int(rng.integers(20, 60)))
            draw.text((x, y), words[int(rng.integers(len(words)))], fill=colour, font=font)
    noise = rng.normal(0, rng.uniform(0, 12), (height, width, 1))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
