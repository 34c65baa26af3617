"""Preprocess images and tokenize texts for a model."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import ImageError
from ..models.clip import PreprocessConfig
from .image import ImageSource, open_resized, resize_shorter, to_array
from .tokenizer import Tokenizer, clip_tokenizer

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class Processor:
    """Image preprocessing and tokenizer of one model.

    Attributes:
        preprocess: Image preprocessing.
        tokenizer: Tokenizer of the text tower.
    """

    def __init__(self, preprocess: PreprocessConfig, tokenizer: Tokenizer | None = None):
        """Create a processor, by default with CLIP's tokenizer."""
        self.preprocess = preprocess
        self._tokenizer = tokenizer

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, built on first use."""
        if self._tokenizer is None:
            self._tokenizer = clip_tokenizer()
        return self._tokenizer

    def images(self, sources: Sequence[ImageSource]) -> mx.array:
        """Preprocess images.

        Args:
            sources: Paths, encoded bytes, PIL images or uint8 arrays; at least one.

        Returns:
            float32 (B, S, S, 3).

        Raises:
            ImageError: an image cannot be used, or `sources` is not a list.
        """
        is_list = isinstance(sources, (Sequence, np.ndarray, mx.array)) and not isinstance(
            sources, (str, bytes, bytearray)
        )
        if not is_list or not len(sources):
            raise ImageError("images takes a list of at least one image")
        return mx.array(np.stack([self.pixels(source) for source in sources]))

    def pixels(self, source: ImageSource) -> NDArray[np.float32]:
        """Preprocess one image, without MLX, so that any thread can do it.

        Returns:
            float32 (S, S, 3).
        """
        return normalized(
            open_resized(source, lambda image: resized(image, self.preprocess)), self.preprocess
        )

    def texts(self, texts: Sequence[str]) -> mx.array:
        """Tokenize texts; one that is too long is truncated with a warning.

        Args:
            texts: At least one text.

        Returns:
            int32 (B, L), padded with 0.

        Raises:
            PromptError: `texts` is not a list of texts.
        """
        return mx.array(self.tokenizer(texts))


def resized(image: Image.Image, config: PreprocessConfig) -> Image.Image:
    """Resize the shorter side, then centre-crop at the same pixels as torchvision.

    Source: torchvision 0.25 `transforms/functional.py` center_crop, which rounds an offset of
    half a pixel to even.
    """
    size = config.image_size
    whole = resize_shorter(image, size, RESAMPLING[config.interpolation])
    left, top = (round((side - size) / 2) for side in whole.size)
    return whole.crop((left, top, left + size, top + size))


def normalized(image: Image.Image, config: PreprocessConfig) -> NDArray[np.float32]:
    """Pixels of a resized image as the model takes them: float32 (S, S, 3)."""
    pixels = to_array(image)
    # In place and in float32, as torchvision's ToTensor and Normalize compute it.
    pixels -= np.array(config.mean, np.float32)
    pixels /= np.array(config.std, np.float32)
    return pixels
