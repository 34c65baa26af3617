"""What a quantised model is compared on: pictures drawn here, and what is asked of them.

Drawn, so that converting needs no data and no licence; `--calibration DIR` takes one's own
pictures, which tell more about one's own use.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mlx_mobileclip.errors import DataError
from mlx_mobileclip.image import open_image

MOST_IMAGES = 32
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif"}
# Question and the beginning of an answer; both are read, and the token after each is compared.
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
    """One picture and what is said about it."""

    image: Image.Image
    question: str
    answer: str


def samples(directory: Path | None) -> list[Sample]:
    """Pictures of a directory, or drawn ones, each with one of the conversations.

    Raises:
        DataError: the directory holds no picture that can be read.
    """
    images = drawn() if directory is None else _pictures(directory)
    return [Sample(image, *CONVERSATIONS[i % len(CONVERSATIONS)]) for i, image in enumerate(images)]


def _pictures(directory: Path) -> list[Image.Image]:
    if not directory.is_dir():
        raise DataError(f"{directory}: is no directory; give one with pictures as --calibration")
    paths = sorted(p for p in directory.iterdir() if p.suffix.lower() in SUFFIXES)[:MOST_IMAGES]
    if not paths:
        raise DataError(f"{directory}: holds no picture; give a directory with some")
    return [open_image(path) for path in paths]


def drawn(count: int = len(CONVERSATIONS)) -> list[Image.Image]:
    """Pictures of shaded grounds, shapes, letters and noise, the same on every machine."""
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
