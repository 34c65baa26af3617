"""Convert a prompt and its images to arrays for the model."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import BinaryIO, cast

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_mobileclip.errors import ImageError
from mlx_mobileclip.preprocess.image import (
    ImageSource,
    is_data_uri,
    open_image,
    open_square,
    read_image,
    to_array,
)

from ..models.config import IMAGE_MODES, RESOLUTIONS, FastVLMConfig
from ..preprocess import chat_format as chat
from .messages import Image, Message
from .tokenizer import Tokenizer

KEY_ROWS = 64  # rows of an image to hash at a time

Images = ImageSource | Sequence[ImageSource] | None


@dataclass(frozen=True, slots=True)
class Inputs:
    """Inputs of the model: `model(inputs.input_ids[None], pixels=inputs.pixels)`.

    Attributes:
        input_ids: (L,), int32; one IMAGE_TOKEN for each image embedding.
        pixels: (n, S, S, 3), float32 in [0, 1]; None without images.
    """

    input_ids: mx.array
    pixels: mx.array | None


class Picture:
    """An image of a prompt, not resized yet, nor decoded if it is a file or encoded bytes.

    Attributes:
        count: Number of its embeddings.
    """

    def __init__(self, source: ImageSource, size: int, mode: str, count: int):
        """Read the image; raises ImageError if that fails.

        Args:
            source: Path, data URI, encoded bytes, file object, PIL image or uint8 array.
            size: Side in pixels to resize it to.
            mode: "pad" or "crop".
            count: Number of its embeddings.
        """
        self.count = count
        self._name, self._size, self._mode = "image", size, mode
        if isinstance(source, (str, os.PathLike)) and not is_data_uri(source):
            self._name = os.fspath(source)
        if isinstance(source, (str, os.PathLike)) or hasattr(source, "read"):
            source = read_image(cast(str | os.PathLike[str] | BinaryIO, source))
        elif isinstance(source, memoryview):
            source = bytes(source)
        elif not isinstance(source, (bytes, bytearray)):
            source = open_image(source)
        self._source = source

    @cached_property
    def key(self) -> str:
        """Hash of what determines the pixels, in 64 hex digits: content, size and mode."""
        source = self._source
        kind = "file" if isinstance(source, (bytes, bytearray)) else f"{source.size}"
        digest = hashlib.sha256(f"{kind} {self._size} {self._mode}\n".encode())
        if isinstance(source, (bytes, bytearray)):
            digest.update(source)
        else:
            for top in range(0, source.height, KEY_ROWS):  # in strips, to avoid a copy
                strip = source.crop((0, top, source.width, min(top + KEY_ROWS, source.height)))
                digest.update(strip.tobytes())
        return digest.hexdigest()

    def pixels(self) -> NDArray[np.float32]:
        """RGB in [0, 1], (S, S, 3); raises ImageError if the image is damaged."""
        return to_array(open_square(self._source, self._size, self._mode, self._name))


class Processor:
    """Tokenizer, conversation format and image preprocessing of one checkpoint."""

    def __init__(self, tokenizer: Tokenizer, config: FastVLMConfig):
        """Keep the tokenizer, and the image settings and maximum length of the config."""
        self.tokenizer = tokenizer
        self.image_size = config.image_size
        self.image_mode = config.image_mode
        self.max_length = config.max_length
        self._stride = config.vision.stride

    def __call__(
        self,
        prompt: str | Sequence[Message],
        images: Images = None,
        *,
        system: str | None = None,
        resolution: int | None = None,
        image_mode: str | None = None,
    ) -> Inputs:
        """Prepare a prompt and its images.

        Args:
            prompt: A question, or a list of messages (see `messages.read_messages`).
            images: One image or several, in the order of their places in the prompt: paths,
                encoded bytes, PIL images or uint8 arrays.
            system: System prompt instead of "You are a helpful assistant.".
            resolution: Side in pixels, 128 to 1536 in steps of 64; more detail for more tokens,
                (S/64)^2 an image. Defaults to what the checkpoint was trained at.
            image_mode: "pad" or "crop"; defaults to the checkpoint's.

        Raises:
            PromptError, ImageError: naming what cannot be used.
        """
        ids, pictures = self.prepare(
            prompt, images, system=system, resolution=resolution, image_mode=image_mode
        )
        pixels = [picture.pixels() for picture in pictures]
        return Inputs(mx.array(ids, mx.int32), mx.array(np.stack(pixels)) if pixels else None)

    def prepare(
        self,
        prompt: str | Sequence[Message],
        images: Images = None,
        *,
        system: str | None = None,
        resolution: int | None = None,
        image_mode: str | None = None,
    ) -> tuple[list[int], list[Picture]]:
        """Prepare a prompt without its pixels: ids, and images in the order of their places."""
        given = _as_list(images)
        size, mode = self._image_options(resolution, image_mode)
        parts = chat.render(prompt, len(given), system)
        count = (size // self._stride) ** 2
        ids = chat.encode(parts, self.tokenizer, count, self.max_length)
        separate = iter(given)
        sources = [
            next(separate) if part.source is None else part.source
            for part in parts
            if isinstance(part, Image)
        ]
        return ids, [Picture(source, size, mode, count) for source in sources]

    def _image_options(self, resolution: int | None, image_mode: str | None) -> tuple[int, str]:
        size = self.image_size if resolution is None else resolution
        mode = self.image_mode if image_mode is None else image_mode
        check_resolution(size)
        size = int(size)  # may be NumPy's
        if mode not in IMAGE_MODES:
            raise ImageError(f"image_mode {mode!r} is not one of {', '.join(IMAGE_MODES)}")
        return size, mode


def check_resolution(size: int) -> None:
    """Raise ImageError unless images can be resized to this side in pixels."""
    if isinstance(size, bool) or not isinstance(size, Integral) or size not in RESOLUTIONS:
        raise ImageError(
            f"resolution {size} is not one of {RESOLUTIONS.start} to {RESOLUTIONS.stop - 1} "
            f"in steps of {RESOLUTIONS.step}"
        )


def _as_list(images: Images) -> list[ImageSource]:
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return list(images)
    return [cast(ImageSource, images)]
