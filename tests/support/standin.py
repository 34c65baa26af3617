"""A tiny model with predictable embeddings and the API of `mlx_mobileclip.load`.

The first three dimensions are red, green and blue, for images and texts alike; the others add
small differences between embeddings.
"""

import os
import time
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from PIL import Image

from mlx_mobileclip.preprocess.image import open_image, to_array

SIZE = 8
WIDTH = 12
COLOURS = ("red", "green", "blue")


class Tower(nn.Module):
    def __init__(self, features: int, seed: int) -> None:
        super().__init__()
        rng = np.random.default_rng(seed)
        self.weight = mx.array(rng.normal(0, 0.02, (features, WIDTH - 3)).astype(np.float32))

    def __call__(self, colours: mx.array, features: mx.array, normalize: bool) -> mx.array:
        rows = mx.concatenate([colours, features @ self.weight], axis=-1)
        return rows / mx.linalg.norm(rows, axis=-1, keepdims=True) if normalize else rows


class StandIn(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.image = Tower(SIZE * SIZE * 3, seed)
        self.text = Tower(77, seed + 1)
        self.logit_scale = mx.array(np.log(50.0), mx.float32)
        self.config = SimpleNamespace(image="tower", text="tower", preprocess=SIZE, embed_dim=WIDTH)
        self.image_batches: list[int] = []
        self.texts_seen = 0

    def encode_image(self, pixels: mx.array, normalize: bool = True) -> mx.array:
        time.sleep(float(os.environ.get("STANDIN_SECONDS", "0")))
        self.image_batches.append(pixels.shape[0])
        flat = pixels.reshape(pixels.shape[0], -1)
        return self.image(pixels.mean(axis=(1, 2)), flat, normalize)

    def encode_text(self, ids: mx.array, normalize: bool = True) -> mx.array:
        self.texts_seen += ids.shape[0]
        values = ids.astype(mx.float32)
        return self.text(values[:, :3], values / 128, normalize)


class StandInProcessor:
    def __init__(self) -> None:
        self.tokenizer = SimpleNamespace(
            fingerprint="stand-in", may_be_truncated=lambda prompt: len(prompt) > 73
        )

    def pixels(self, source: Any) -> Any:
        return to_array(open_image(source).resize((SIZE, SIZE)))

    def images(self, sources: list[Any]) -> mx.array:
        return mx.array(np.stack([self.pixels(source) for source in sources]))

    def texts(self, texts: list[str]) -> mx.array:
        ids = np.zeros((len(texts), 77), np.int32)
        for row, text in zip(ids, texts, strict=True):
            row[:3] = [colour in text for colour in COLOURS]
            codes = [ord(character) % 128 for character in text][:73]
            row[3 : 3 + len(codes)] = codes
            row[76] = 64  # no text is all zeros
        return mx.array(ids)


def load(*_: Any, **__: Any) -> tuple[StandIn, StandInProcessor]:
    return StandIn(), StandInProcessor()


def paint(path: Any, colour: str, seed: int = 0) -> str:
    """Write an image of one colour with a little noise."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 40, (10, 14, 3), np.uint8)
    pixels[..., COLOURS.index(colour)] += 200
    Image.fromarray(pixels).save(path)
    return str(path)
