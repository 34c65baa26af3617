"""MobileCLIP: an image tower and a text tower that embed into one space (arXiv:2311.17049)."""

from dataclasses import asdict, dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..concurrency import register_thread
from ..errors import ImageError, ModelError, PromptError
from ..json_fields import Fields
from ..layers import global_average_pool
from ..quantization import (
    QuantizedLayers,
    quantization_entry,
    quantize_layers,
    read_quantized_layers,
)
from .fastvit import FastViT, FastViTConfig
from .text import TextConfig, TextTower
from .vit import ViT, ViTConfig

MODEL_TYPE = "mlx_mobileclip"
FORMAT_VERSION = 1
INTERPOLATIONS = ("bilinear", "bicubic")
PARTS = {"image": "image.", "text": "text."}  # prefix of the parameters in each part


@dataclass(frozen=True, slots=True)
class PreprocessConfig:
    """Image preprocessing: resize the shorter side to `image_size`, centre-crop, normalise.

    Attributes:
        image_size: Side in pixels.
        interpolation: "bilinear" or "bicubic", both antialiased.
        mean: Per-channel mean, for values in [0, 1].
        std: Per-channel standard deviation.
    """

    image_size: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_json(cls, fields: Fields) -> "PreprocessConfig":
        """Read and check a `preprocess_config`; raises ConfigError naming the field at fault."""
        return cls(
            image_size=fields.integer("image_size", 16, 1024),
            interpolation=fields.choice("interpolation", INTERPOLATIONS),
            mean=fields.numbers("mean", -10, 10, length=3),
            std=fields.numbers("std", 1e-3, 10, length=3),
        )


@dataclass(frozen=True, slots=True)
class MobileCLIPConfig:
    """Configuration of a MobileCLIP checkpoint.

    Attributes:
        variant: Published model that has this architecture.
        embed_dim: Width of the embeddings.
        image: Architecture of the image tower.
        text: Architecture of the text tower; None if the checkpoint has only an image tower.
        preprocess: Image preprocessing.
        quantization: Quantisation of each quantised layer, by its path in the model.
        source: Origin of the checkpoint: model, revision, layout.
    """

    variant: str
    embed_dim: int
    image: FastViTConfig | ViTConfig
    text: TextConfig | None
    preprocess: PreprocessConfig
    quantization: QuantizedLayers = field(default_factory=dict)
    source: dict[str, str | None] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the contents of the canonical config.json."""
        tower = "vit" if isinstance(self.image, ViTConfig) else "fastvit"
        result = {
            "model_type": MODEL_TYPE,
            "format_version": FORMAT_VERSION,
            "variant": self.variant,
            "embed_dim": self.embed_dim,
            "image_config": {"tower": tower, **self.image.to_json()},
            "preprocess_config": asdict(self.preprocess),
            "source": self.source,
        }
        if self.text is not None:
            result["text_config"] = self.text.to_json()
        if self.quantization:
            result["quantization"] = quantization_entry(self.quantization)
        return result

    @classmethod
    def from_json(cls, values: dict[str, Any], where: str) -> "MobileCLIPConfig":
        """Read and check a canonical config.json; raises ConfigError naming the field at fault."""
        fields = Fields(values, where)
        fields.check_version(FORMAT_VERSION)
        image = fields.object("image_config")
        vit = image.choice("tower", ("fastvit", "vit")) == "vit"
        config = cls(
            variant=fields.string("variant"),
            embed_dim=fields.integer("embed_dim", 1, 65536),
            image=ViTConfig.from_json(image) if vit else FastViTConfig.from_json(image),
            text=TextConfig.from_json(fields.object("text_config"))
            if fields.has("text_config")
            else None,
            preprocess=PreprocessConfig.from_json(fields.object("preprocess_config")),
            quantization=read_quantized_layers(fields),
            source=fields.record("source"),
        )
        size = config.preprocess.image_size
        if isinstance(config.image, ViTConfig) and config.image.image_size != size:
            raise fields.error("preprocess_config", f"image_size {size} is not image_config's")
        return config


class ImageTower(nn.Module):
    """An image trunk and its projection into the embedding space."""

    def __init__(self, config: FastViTConfig | ViTConfig, embed_dim: int):
        super().__init__()
        self.trunk = ViT(config) if isinstance(config, ViTConfig) else FastViT(config)
        self.projection = nn.Linear(config.features, embed_dim)

    def __call__(self, pixels: mx.array) -> mx.array:
        """(B, S, S, 3) to (B, E)."""
        return self.project(self.trunk(pixels))

    def project(self, x: mx.array) -> mx.array:
        """Project the trunk's output, (B, H, W, C) or (B, C), to (B, E)."""
        if x.ndim == 4:
            x = global_average_pool(x)  # (B, features)
        return self.projection(x)


class MobileCLIP(nn.Module):
    """Image tower and text tower; `text` and `logit_scale` are None without a text tower.

    Attributes:
        config: Its configuration.
        image: The image tower.
        text: The text tower.
        logit_scale: Natural logarithm of the trained temperature: multiply cosine similarities by
            min(exp(logit_scale), 100) before the softmax over labels.
    """

    def __init__(self, config: MobileCLIPConfig):
        super().__init__()
        self.config = config
        self.image = ImageTower(config.image, config.embed_dim)
        has_text = config.text is not None
        self.text = TextTower(config.text, config.embed_dim) if config.text else None
        self.logit_scale = mx.array(np.log(1 / 0.07), mx.float32) if has_text else None
        quantize_layers(self, config.quantization)

    def encode_image(self, pixels: mx.array, normalize: bool = False) -> mx.array:
        """Embed images.

        Args:
            pixels: (B, S, S, 3), from `Processor.images`.
            normalize: Scale each embedding to length 1.

        Returns:
            float32 (B, E).

        Raises:
            ImageError: the shape or dtype is not what the tower takes.
        """
        register_thread()
        pixels = as_pixels(pixels)
        if pixels.ndim != 4 or pixels.shape[3] != 3 or min(pixels.shape[:3]) < 1:
            raise ImageError(f"pixels have shape {pixels.shape}; expected (B, S, S, 3)")
        return embedding(self.image(pixels), normalize)

    def encode_text(self, ids: mx.array, normalize: bool = False) -> mx.array:
        """Embed texts.

        Args:
            ids: (B, L), from `Processor.texts`.
            normalize: Scale each embedding to length 1.

        Returns:
            float32 (B, E).

        Raises:
            ModelError: the checkpoint has no text tower.
            PromptError: the shape or dtype is wrong, or an id is outside the vocabulary.
        """
        register_thread()
        if self.text is None or self.config.text is None:
            raise ModelError(
                "this checkpoint has an image tower only; to embed texts, load one with both, such "
                "as apple/MobileCLIP2-S0"
            )
        ids = _as_ids(ids)
        length, vocab_size = self.config.text.context_length, self.config.text.vocab_size
        if ids.ndim != 2 or ids.shape[1] != length or not len(ids):
            raise PromptError(f"ids have shape {ids.shape}; expected (B, {length})")
        values = np.asarray(ids)
        if values.min() < 0 or values.max() >= vocab_size:
            raise PromptError(f"a token id is outside the vocabulary of {vocab_size}")
        return embedding(self.text(ids), normalize)


def embedding(x: mx.array, normalize: bool) -> mx.array:
    """Convert a tower's output to float32 embeddings (B, E)."""
    x = x.astype(mx.float32)  # the sum of squares can exceed float16
    return x / mx.linalg.norm(x, axis=-1, keepdims=True) if normalize else x


def as_pixels(pixels: mx.array) -> mx.array:
    """Convert pixels to an MLX array; raises ImageError unless they are an array of floats."""
    if isinstance(pixels, np.ndarray) and np.issubdtype(pixels.dtype, np.floating):
        pixels = mx.array(pixels.astype(np.float32))
    if not isinstance(pixels, mx.array) or not mx.issubdtype(pixels.dtype, mx.floating):
        kind = getattr(pixels, "dtype", type(pixels).__name__)
        raise ImageError(f"pixels cannot be {kind}; pass what the processor returns for an image")
    return pixels


def _as_ids(ids: mx.array) -> mx.array:
    """Convert ids to an MLX array; raises PromptError unless they are an array of integers."""
    if isinstance(ids, np.ndarray) and np.issubdtype(ids.dtype, np.integer):
        ids = mx.array(ids)
    if not isinstance(ids, mx.array) or not mx.issubdtype(ids.dtype, mx.integer):
        kind = getattr(ids, "dtype", type(ids).__name__)
        raise PromptError(f"ids cannot be {kind}; pass what Processor.texts returns")
    return ids
