"""A cache of image embeddings, so that each image is encoded once."""

import hashlib
import os
import weakref
from collections import OrderedDict
from threading import Lock

import mlx.core as mx
import numpy as np

from mlx_mobileclip import __version__
from mlx_mobileclip.caching.disk_cache import DiskCache
from mlx_mobileclip.caching.fingerprint import Weights
from mlx_mobileclip.paths import user_path

from ..models.fastvlm import FastVLM


class ImageCache:
    """Embeddings of the most recent images, in memory and optionally on disk.

    It serves one model at a time and is emptied when used with other weights. It is thread-safe.
    """

    def __init__(
        self, max_bytes: int = 256 << 20, directory: str | os.PathLike[str] | None = None
    ) -> None:
        """Create an empty cache.

        Args:
            max_bytes: Limit on memory; an image of 1024 px takes 0.5 MB in the 0.5B model in
                float16, 1.8 MB in the 7B. 0 keeps nothing in memory.
            directory: Directory to keep embeddings in between runs, up to 512 MB. They reveal part
                of what the images show, so protect it like the images.
        """
        self.max_bytes = max_bytes
        self._disk = None if directory is None else DiskCache(user_path(directory))
        self._entries: OrderedDict[str, mx.array] = OrderedDict()
        self._weights = Weights()
        self._lock = Lock()

    def get(self, model: FastVLM, weights: Weights, key: str, count: int) -> mx.array | None:
        """Look up the embeddings of an image.

        Args:
            model: The model to use them with.
            weights: Its `image_weights`.
            key: The image's `Picture.key`.
            count: Expected number of embeddings.

        Returns:
            (1, count, D), or None.
        """
        with self._lock:
            if not self._weights.same_as(weights):
                self._weights = weights
                self._entries.clear()
            weights = self._weights  # its fingerprint may be known already
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
        if self._disk is None:
            return None
        width = model.config.text.hidden_size
        stored = self._disk.read(_file_name(model, weights, key), count, width)
        if stored is None:
            return None
        features = mx.array(stored)[None]
        mx.eval(features)
        self._store(weights, key, features)
        return features

    def put(self, model: FastVLM, weights: Weights, key: str, features: mx.array) -> None:
        """Store the embeddings of an image.

        Args:
            model: The model that computed them.
            weights: Its `image_weights` at that time.
            key: The image's `Picture.key`.
            features: (1, N, D), evaluated and finite.
        """
        self._store(weights, key, features)
        if self._disk is not None:
            matrix = np.array(features[0].astype(mx.float32))
            self._disk.write(_file_name(model, weights, key), matrix)

    def _store(self, weights: Weights, key: str, features: mx.array) -> None:
        with self._lock:
            if not self._weights.same_as(weights):  # another model has used the cache since
                return
            self._entries[key] = features
            while sum(entry.nbytes for entry in self._entries.values()) > self.max_bytes:
                self._entries.popitem(last=False)


def image_weights(model: FastVLM) -> Weights:
    """The weights that determine a model's image embeddings."""
    return Weights(model.vision_tower, model.projector)


def default_image_cache(model: FastVLM) -> ImageCache:
    """Return the cache that `generate` uses by default; it lives as long as the model."""
    if id(model) not in _default_caches:
        weakref.finalize(model, _default_caches.pop, id(model), None)
    return _default_caches.setdefault(id(model), ImageCache())


_default_caches: dict[int, ImageCache] = {}  # by id(model)


def _file_name(model: FastVLM, weights: Weights, key: str) -> str:
    """Return the file name of a cache entry: a hash of all that the embeddings depend on."""
    content = (__version__, weights.fingerprint, model.config.vision, key)
    return hashlib.sha256(repr(content).encode()).hexdigest()
