"""Image embeddings kept by what they follow from, so that each image is encoded once."""

import hashlib
import os
from collections import OrderedDict
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlx_mobileclip import __version__
from mlx_mobileclip.disk_cache import DiskCache
from mlx_mobileclip.fingerprint import WeightWatch, fingerprint

if TYPE_CHECKING:
    from .model import FastVLM


class ImageCache:
    """The embeddings of the images seen last, in memory and, if wanted, on disk.

    Each model has one. It is emptied when the model's weights are replaced. Any thread can use it.
    """

    def __init__(
        self, max_bytes: int = 256 << 20, directory: str | os.PathLike[str] | None = None
    ) -> None:
        """Begin empty.

        Args:
            max_bytes: Most that is held in memory; an image of 1024 px takes 0.5 MB in the 0.5B
                model in float16, 1.8 MB in the 7B. 0 holds nothing.
            directory: Where to keep embeddings between runs, up to 512 MB. What they show can in
                part be told from them, so it deserves the care of the images themselves.
        """
        self.max_bytes = max_bytes
        self._disk = None if directory is None else DiskCache(Path(directory).expanduser())
        self._entries: OrderedDict[str, mx.array] = OrderedDict()
        self._watch = WeightWatch()
        self._model_name = ""
        self._lock = Lock()

    def get(self, model: "FastVLM", key: str, count: int) -> mx.array | None:
        """The embeddings of an image, or None.

        Args:
            model: Whose tower and projector made them.
            key: Of the image, as `Picture.key`.
            count: How many embeddings there must be.

        Returns:
            (1, count, D).
        """
        with self._lock:
            self._forget_if_changed(model)
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
        if self._disk is None:
            return None
        stored = self._disk.read(self._entry_name(model, key), count)
        if stored is None or stored.shape[1] != model.config.text.hidden_size:
            return None
        features = mx.array(stored)[None]
        mx.eval(features)
        self._keep(key, features)
        return features

    def put(self, model: "FastVLM", key: str, features: mx.array) -> None:
        """Keep the embeddings of an image, (1, N, D), evaluated and finite."""
        with self._lock:
            if self._forget_if_changed(model):  # these are of the old weights
                return
        self._keep(key, features)
        if self._disk is not None:
            matrix = np.array(features[0].astype(mx.float32))
            self._disk.write(self._entry_name(model, key), matrix)

    def _forget_if_changed(self, model: "FastVLM") -> bool:
        changed = self._watch.changed(model.vision_tower, model.projector)
        if changed:
            self._entries.clear()
            self._model_name = ""
        return changed

    def _keep(self, key: str, features: mx.array) -> None:
        with self._lock:
            self._entries[key] = features
            while sum(entry.nbytes for entry in self._entries.values()) > self.max_bytes:
                self._entries.popitem(last=False)

    def _entry_name(self, model: "FastVLM", key: str) -> str:
        """Of a file: what the embeddings follow from, the weights themselves included."""
        if not self._model_name:
            tower = fingerprint(model.vision_tower, model.config.vision)
            layers = [fingerprint(layer) for layer in model.projector]
            self._model_name = " ".join([__version__, tower, *layers])
        return hashlib.sha256(f"{self._model_name} {key}".encode()).hexdigest()
