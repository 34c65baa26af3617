"""Decode images of requests in threads, so that a large one does not block other requests."""

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
MAX_CACHED = 16  # decoded images; one of 1024 px takes 3 MB

T = TypeVar("T")


class Pictures:
    """Decodes data URIs, and checks schemas, in threads."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, "pictures")
        self._schema_thread = ThreadPoolExecutor(1, "schemas")  # does not delay images
        self._cache: OrderedDict[str, Any] = OrderedDict()

    async def run(self, function: Callable[[], T]) -> T:
        """Run a slow function that does not use MLX, such as decoding."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)

    async def check(self, function: Callable[[], T]) -> T:
        """Run a function that checks a schema, in a thread of its own."""
        return await asyncio.get_running_loop().run_in_executor(self._schema_thread, function)

    async def for_model(self, uri: str, processor: Processor) -> ImageSource:
        """Decode and resize an image in advance, as the model's processor would.

        Raises:
            ImageError: it is damaged, or exceeds a limit.
        """
        key = hashlib.sha256(uri.encode()).hexdigest()
        if key not in self._cache:
            self._cache[key] = await self.run(lambda: _decode(uri, processor))
        self._cache.move_to_end(key)
        image: ImageSource = self._cache[key]
        while len(self._cache) > MAX_CACHED:
            self._cache.popitem(last=False)
        return image

    def close(self) -> None:
        """Stop the threads, without waiting for them."""
        for threads in (self._threads, self._schema_thread):
            threads.shutdown(wait=False, cancel_futures=True)


def _decode(uri: str, processor: Processor) -> ImageSource:
    return open_square(read_image(uri), processor.image_size, processor.image_mode)


def check_data_uri(value: Any, where: str) -> str:
    """Return a data URI unchanged; URLs and paths are refused.

    Raises:
        ApiError: the value is not a data URI.
    """
    if not isinstance(value, str) or not is_data_uri(value):
        raise bad(
            f"{where} must be a data URI (data:image/png;base64,...); URLs and paths are "
            "not supported",
            where,
        )
    return value


def image_error(error: ImageError, where: str) -> ApiError:
    """Return the error for an image, with its field name in the request."""
    return bad(f"{where}: {error}", where, "invalid_image")
