"""Decode the images of requests in threads, so that a large or damaged one delays nobody else."""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from mlx_mobileclip.errors import ImageError
from mlx_mobileclip.preprocess.image import (
    ImageSource,
    is_data_uri,
    open_square,
    read_image,
)

from ..preprocess.processor import Processor
from .errors import ApiError, bad

THREADS = 2
KEPT = 16  # decoded images; one of 1024 px takes 3 MB

T = TypeVar("T")


class Pictures:
    """Decodes data URIs, and checks schemas, in threads."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, "pictures")
        self._other = ThreadPoolExecutor(1, "schemas")  # which must not delay images
        self._kept: OrderedDict[str, Any] = OrderedDict()

    async def run(self, function: Callable[[], T]) -> T:
        """Run a function that may take long without MLX, such as decoding."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)

    async def check(self, function: Callable[[], T]) -> T:
        """Run a function that checks a schema."""
        return await asyncio.get_running_loop().run_in_executor(self._other, function)

    async def for_model(self, uri: str, processor: Processor) -> ImageSource:
        """Decode and resize an image as the model will, which then finds nothing left to do.

        Raises:
            ApiError: it is damaged, or beyond the limits on images.
        """
        key = hashlib.sha256(uri.encode()).hexdigest()
        if key not in self._kept:
            self._kept[key] = await self.run(lambda: _decode(uri, processor))
        self._kept.move_to_end(key)
        image: ImageSource = self._kept[key]
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return image

    def close(self) -> None:
        """End the threads, without waiting for them."""
        for threads in (self._threads, self._other):
            threads.shutdown(wait=False, cancel_futures=True)


def _decode(uri: str, processor: Processor) -> ImageSource:
    return open_square(read_image(uri), processor.image_size, processor.image_mode)


def check_data_uri(value: Any, where: str) -> str:
    """Refuse what is not a data URI: nothing is fetched or read.

    Raises:
        ApiError: it is none.
    """
    if not isinstance(value, str) or not is_data_uri(value):
        raise bad(
            f"{where} must be a data URI (data:image/png;base64,...); this server fetches no URL "
            "and reads no file",
            where,
        )
    return value


def image_error(error: ImageError, where: str) -> ApiError:
    """The error for an image, with its place in the request."""
    return bad(f"{where}: {error}", where, "invalid_image")
