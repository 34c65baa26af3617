"""From a prompt and images to the arrays the model reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import numpy as np

from mlx_mobileclip.errors import ImageError
from mlx_mobileclip.image import ImageSource, open_image, resize_crop, resize_pad, to_array

from . import prompt as chat
from .config import IMAGE_MODES, RESOLUTIONS, FastVLMConfig
from .tokenizer import Tokenizer

Images = ImageSource | Sequence[ImageSource] | None


@dataclass(frozen=True, slots=True)
class Inputs:
    """What `model(inputs.input_ids[None], pixels=inputs.pixels)` takes.

    Attributes:
        input_ids: (L,), int32; one IMAGE_TOKEN for each image embedding.
        pixels: (n, S, S, 3), float32 in [0, 1]; None without images.
    """

    input_ids: mx.array
    pixels: mx.array | None


class Processor:
    """Tokenizer, conversation format and image preprocessing of one checkpoint."""

    def __init__(self, tokenizer: Tokenizer, config: FastVLMConfig):
        """Keep the checkpoint's tokenizer and what its config says about images and length."""
        self.tokenizer = tokenizer
        self.image_size = config.image_size
        self.image_mode = config.image_mode
        self.max_length = config.max_length
        self._stride = config.vision.stride

    def __call__(
        self,
        prompt: str | Sequence[chat.Message],
        images: Images = None,
        *,
        system: str | None = None,
        resolution: int | None = None,
        image_mode: str | None = None,
    ) -> Inputs:
        """Prepare a prompt and its images.

        Args:
            prompt: A question, or a list of messages (see `prompt.render`).
            images: One image or several, in the order of their places in the prompt: paths,
                encoded bytes, PIL images or uint8 arrays.
            system: System prompt instead of "You are a helpful assistant.".
            resolution: Side in pixels, 128 to 1536 in steps of 64; more detail for more tokens,
                (S/64)^2 an image. Defaults to what the checkpoint was trained at.
            image_mode: "pad" or "crop"; defaults to the checkpoint's.

        Raises:
            PromptError, ImageError: naming what cannot be used.
        """
        given = _as_list(images)
        size, mode = self._image_options(resolution, image_mode)
        parts = chat.render(prompt, len(given), system)
        ids = chat.encode(parts, self.tokenizer, (size // self._stride) ** 2, self.max_length)
        beside = iter(given)
        sources = [
            next(beside) if part.source is None else part.source
            for part in parts
            if isinstance(part, chat.Image)
        ]
        pixels = [self._pixels(source, size, mode) for source in sources]
        return Inputs(mx.array(ids, mx.int32), mx.array(np.stack(pixels)) if pixels else None)

    def _image_options(self, resolution: int | None, image_mode: str | None) -> tuple[int, str]:
        size = self.image_size if resolution is None else resolution
        mode = self.image_mode if image_mode is None else image_mode
        check_resolution(size)
        if mode not in IMAGE_MODES:
            raise ImageError(f"image_mode {mode!r} is not one of {', '.join(IMAGE_MODES)}")
        return size, mode

    @staticmethod
    def _pixels(source: ImageSource, size: int, mode: str) -> np.ndarray:
        resize = resize_pad if mode == "pad" else resize_crop
        return to_array(resize(open_image(source), size))


def check_resolution(size: int) -> None:
    """Raise ImageError unless images can be resized to this side, px."""
    if isinstance(size, bool) or not isinstance(size, int) or size not in RESOLUTIONS:
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
