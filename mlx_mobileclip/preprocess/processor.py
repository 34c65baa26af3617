"""From images and texts to the arrays the model reads."""

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
        preprocess: How images are prepared.
        tokenizer: What turns text into ids.
    """

    def __init__(self, preprocess: PreprocessConfig, tokenizer: Tokenizer | None = None):
        """Keep how images are prepared; the tokenizer is CLIP's unless another is given."""
        self.preprocess = preprocess
        self._tokenizer = tokenizer

    @property
    def tokenizer(self) -> Tokenizer:
        """Built on first use: images do without."""
        if self._tokenizer is None:
            self._tokenizer = clip_tokenizer()
        return self._tokenizer

    def images(self, sources: Sequence[ImageSource]) -> mx.array:
        """Prepare images.

        Args:
            sources: Paths, encoded bytes, PIL images or uint8 arrays; at least one.

        Returns:
            float32 (B, S, S, 3).

        Raises:
            ImageError: naming the image that cannot be used.
        """
        is_list = isinstance(sources, (Sequence, np.ndarray, mx.array)) and not isinstance(
            sources, (str, bytes, bytearray)
        )
        if not is_list or not len(sources):
            raise ImageError("images takes a list of at least one image")
        return mx.array(np.stack([self.pixels(source) for source in sources]))

    def pixels(self, source: ImageSource) -> NDArray[np.float32]:
        """Prepare one image, without MLX, so that any thread can do it.

        Returns:
            float32 (S, S, 3).
        """
        size, resample = self.preprocess.image_size, RESAMPLING[self.preprocess.interpolation]
        image = open_resized(source, lambda whole: _resize_crop(whole, size, resample))
        pixels = to_array(image)
        # In place and in float32, as torchvision's ToTensor and Normalize compute it.
        pixels -= np.array(self.preprocess.mean, np.float32)
        pixels /= np.array(self.preprocess.std, np.float32)
        return pixels

    def texts(self, texts: Sequence[str]) -> mx.array:
        """Turn texts into ids; one that is too long is cut, with a warning.

        Args:
            texts: At least one text.

        Returns:
            int32 (B, L), padded with 0.

        Raises:
            PromptError: no list of texts.
        """
        return mx.array(self.tokenizer(texts))


def _resize_crop(image: Image.Image, size: int, resample: Image.Resampling) -> Image.Image:
    """Shorter side to `size`, then the central square, to the pixel as torchvision cuts it.

    Source: torchvision 0.25 `transforms/functional.py` center_crop, which rounds an offset of
    half a pixel to even.
    """
    resized = resize_shorter(image, size, resample)
    left, top = (round((side - size) / 2) for side in resized.size)
    return resized.crop((left, top, left + size, top + size))
