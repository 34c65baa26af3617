"""Run MobileCLIP in the engine's thread, in small batches between decoding steps."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_mobileclip.errors import ImageError, ModelError
from mlx_mobileclip.eval.zero_shot import Prediction, build_zero_shot_classifier, predict
from mlx_mobileclip.models.clip import MobileCLIP
from mlx_mobileclip.preprocess.image import read_image
from mlx_mobileclip.preprocess.processor import Processor

from .clip_inputs import Item
from .engine import Engine
from .errors import bad
from .pictures import Pictures, image_error

TEXT_BATCH, IMAGE_BATCH = 32, 4
MAX_CACHED_LABELS = 64  # cached sets of label embeddings

Rows = NDArray[np.float32]


class Clip:
    """Embeds and classifies for all clients."""

    def __init__(self, model: MobileCLIP, processor: Processor, engine: Engine, pictures: Pictures):
        """Run the model in the engine's thread."""
        self._model, self._processor = model, processor
        self._engine, self._pictures = engine, pictures
        self._labels: OrderedDict[tuple[tuple[str, ...], tuple[str, ...]], mx.array] = OrderedDict()

    @property
    def size(self) -> int:
        """Width of the embeddings."""
        return self._model.config.embed_dim

    async def embed(self, items: Sequence[Item], *, normalize: bool = True) -> tuple[Rows, int]:
        """Embed texts and images.

        Returns:
            Embeddings, float32 (N, E), and the number of text tokens.

        Raises:
            ApiError: an image cannot be used.
        """
        rows, tokens = np.zeros((len(items), self.size), np.float32), 0
        texts = [i for i, item in enumerate(items) if item.kind == "text"]
        images = [i for i, item in enumerate(items) if item.kind == "image"]
        if texts and self._model.text is None:
            raise bad("this model embeds images only; the server needs one with a text tower")
        for start in range(0, len(texts), TEXT_BATCH):
            indices = texts[start : start + TEXT_BATCH]
            ids = await self._tokenize([items[i].value for i in indices])
            tokens += int((ids.argmax(axis=1) + 1).sum())  # the end token has the largest id
            rows[indices] = await self._engine.call(
                partial(_embed, self._model.encode_text, ids, normalize)
            )
        for start in range(0, len(images), IMAGE_BATCH):
            indices = images[start : start + IMAGE_BATCH]
            pixels = await self._pixels([items[i] for i in indices])
            rows[indices] = await self._engine.call(
                partial(_embed, self._model.encode_image, pixels, normalize)
            )
        return rows, tokens

    async def classify(
        self,
        items: Sequence[Item],
        labels: Sequence[str],
        templates: Sequence[str],
        top_k: int,
    ) -> list[list[Prediction]]:
        """Return the best labels of each image.

        Raises:
            ApiError: an image cannot be used.
            DataError: a template cannot be used.
        """
        if self._model.text is None:
            raise bad("this model has no text tower, so it cannot classify by labels")
        classifier = await self._classifier(tuple(labels), tuple(templates))
        embeddings, _ = await self.embed(items)
        return await self._engine.call(
            lambda: predict(self._model, mx.array(embeddings), classifier, labels, top_k)
        )

    async def _classifier(self, labels: tuple[str, ...], templates: tuple[str, ...]) -> mx.array:
        key = labels, templates
        if key not in self._labels:
            step = max(1, TEXT_BATCH // len(templates))
            parts = []
            for start in range(0, len(labels), step):
                group = labels[start : start + step]
                call = partial(self._embed_labels, group, templates)
                parts.append(await self._engine.call(call))
            self._labels[key] = await self._engine.call(lambda: _concatenate(parts))
        self._labels.move_to_end(key)
        classifier = self._labels[key]
        while len(self._labels) > MAX_CACHED_LABELS:
            self._labels.popitem(last=False)
        return classifier

    def _embed_labels(self, labels: Sequence[str], templates: Sequence[str]) -> mx.array:
        return build_zero_shot_classifier(
            self._model, self._processor, labels, templates, cache=False
        )

    async def _tokenize(self, texts: list[str]) -> NDArray[Any]:
        return await self._pictures.run(lambda: self._processor.tokenizer(texts))

    async def _pixels(self, items: Sequence[Item]) -> Rows:
        return np.stack([await self._pictures.run(partial(self._decode, item)) for item in items])

    def _decode(self, item: Item) -> Rows:
        try:
            return self._processor.pixels(read_image(item.value))
        except ImageError as error:
            raise image_error(error, item.where) from error


def _embed(encode: Callable[..., mx.array], inputs: NDArray[Any], normalize: bool) -> Rows:
    rows = np.array(encode(mx.array(inputs), normalize))
    if not np.isfinite(rows).all():
        raise ModelError("an embedding is not finite; start the server with --dtype float32")
    return rows


def _concatenate(parts: list[mx.array]) -> mx.array:
    matrix = mx.concatenate(parts)
    mx.eval(matrix)
    return matrix
