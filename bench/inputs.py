"""Inputs of the benchmarks: images of noise, and random questions."""

import io
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

TWELVE_MEGAPIXELS = (4032, 3024)


def photo(seed: int, side: int) -> Image.Image:
    """A square image of noise."""
    values = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    return Image.fromarray(values)


def pixels(seed: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Random float32 values in [0, 1)."""
    return np.random.default_rng(seed).random(shape, np.float32)


def jpeg(*, turned: bool = False) -> bytes:
    """A JPEG of 12 megapixels, smooth like a photo, because noise takes longer to decode."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    size = TWELVE_MEGAPIXELS[::-1] if turned else TWELVE_MEGAPIXELS
    image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def camera(*, decoded: bool) -> Callable[[], Image.Image]:
    """Return a function that opens the photo of `jpeg`, decoded once in advance if `decoded`."""
    file = jpeg()
    image = Image.open(io.BytesIO(file)).convert("RGB")
    return lambda: image if decoded else Image.open(io.BytesIO(file))


def text_ids(seed: int, tokens: int, vocab_size: int = 256) -> NDArray[np.int64]:
    """Random ids of ordinary tokens."""
    return np.random.default_rng(seed).integers(0, vocab_size, tokens)
