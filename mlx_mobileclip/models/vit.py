"""Vision transformers: MobileCLIP-B's with a convolutional stem, and CLIP's ViT-L/14.

The two published implementations of B differ in the padding of the first convolution and in
LayerNorm's epsilon. A checkpoint needs those that it was trained with, so both are config fields.

Source: apple/ml-mobileclip 4144bb1 `mobileclip/models/vit.py`; timm 1.0.31
`timm/models/vision_transformer.py` (vit_base_mci_224, vit_large_patch14_clip_224).
"""

from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import ImageError
from ..json_fields import Fields
from ..layers import GELU, run
from .transformer import TransformerLayer

STEMS = ("convolutional", "patch")
STEM_SIZES = (4, 2, 2)  # kernel and stride of the convolutional stem's layers


@dataclass(frozen=True, slots=True)
class ViTConfig:
    """Architecture of a vision transformer.

    Attributes:
        stem: "convolutional" (positions are added to patches only) or "patch" (one convolution,
            positions of patches and class token, LayerNorm before the first layer).
        image_size: Side in pixels, fixed by the position embeddings.
        patch_size: Pixels per patch.
        width: Channels.
        layers: Transformer layers.
        heads: Attention heads.
        stem_padding: Padding of the convolutional stem's first layer: 1 in Apple's code, 0 in
            timm's.
        eps: Epsilon of every LayerNorm: 1e-5 in Apple's code, 1e-6 in timm's B.
    """

    stem: str
    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    stem_padding: int
    eps: float

    @property
    def patches(self) -> int:
        """Number of patches per image."""
        return int((self.image_size // self.patch_size) ** 2)

    @property
    def stride(self) -> int:
        """Input pixels per patch."""
        return self.patch_size

    @property
    def features(self) -> int:
        """Channels of the output."""
        return self.width

    @property
    def stem_width(self) -> int:
        """Channels of the convolutional stem's first two layers."""
        return self.width // 4

    def to_json(self) -> dict[str, Any]:
        """Return the `image_config` of a canonical config.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Fields) -> "ViTConfig":
        """Read and check an `image_config`; raises ConfigError naming the field at fault."""
        config = cls(
            stem=fields.choice("stem", STEMS),
            image_size=fields.integer("image_size", 16, 1024),
            patch_size=fields.integer("patch_size", 1, 64),
            width=fields.integer("width", 4, 8192),
            layers=fields.integer("layers", 1, 256),
            heads=fields.integer("heads", 1, 256),
            stem_padding=fields.integer("stem_padding", 0, 1),
            eps=fields.number("eps", 1e-12, 0.1),
        )
        if config.image_size % config.patch_size:
            raise fields.error("image_size", f"is not a multiple of {config.patch_size}")
        if config.width % config.heads or config.width % 4:
            raise fields.error("width", f"is not a multiple of 4 and of heads, {config.heads}")
        if config.stem == "convolutional" and config.patch_size != 16:
            raise fields.error("patch_size", "is not 16, which the convolutional stem requires")
        return config


class ConvolutionalStem(nn.Module):
    """4x4, 2x2 and 2x2 convolutions with strides of the same size; GELU between them."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        widths = (3, config.stem_width, config.stem_width, config.width)
        paddings = (config.stem_padding, 0, 0)
        self.convs = [
            nn.Conv2d(widths[i], widths[i + 1], size, stride=size, padding=paddings[i])
            for i, size in enumerate(STEM_SIZES)
        ]
        self.act = GELU()

    def __call__(self, pixels: mx.array) -> mx.array:
        """(B, S, S, 3) to (B, S/16, S/16, D)."""
        x = pixels
        for i, conv in enumerate(self.convs):
            x = conv(self.act(x) if i else x)
        return x


class PatchStem(nn.Module):
    """One convolution without bias; its stride is its size."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        size = config.patch_size
        self.convs = [nn.Conv2d(3, config.width, size, stride=size, bias=False)]

    def __call__(self, pixels: mx.array) -> mx.array:
        """(B, S, S, 3) to (B, S/P, S/P, D)."""
        return self.convs[0](pixels)


class ViT(nn.Module):
    """The tower: stem, class token, positions, transformer; it returns the class token."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        patch = config.stem == "patch"
        self.stem = PatchStem(config) if patch else ConvolutionalStem(config)
        self.class_token = mx.zeros((config.width,))
        self.positions = mx.zeros((config.patches + patch, config.width))
        self.norm_pre = nn.LayerNorm(config.width, config.eps) if patch else None
        self.layers = [
            TransformerLayer(config.width, config.heads, 4 * config.width, config.eps)
            for _ in range(config.layers)
        ]
        self.norm = nn.LayerNorm(config.width, config.eps)
        self._image_size = config.image_size

    def __call__(self, pixels: mx.array) -> mx.array:
        """Compute the features of images.

        Args:
            pixels: (B, S, S, 3), preprocessed.

        Returns:
            (B, D).

        Raises:
            ImageError: S is not the config's image_size.
        """
        return self.pool(run(self.layers, self.embed(pixels), self.training))

    def embed(self, pixels: mx.array) -> mx.array:
        """Return the input of the first layer: class token and patches, (B, 1 + P, D)."""
        size = self._image_size
        if pixels.shape[1:3] != (size, size):
            raise ImageError(f"pixels have shape {pixels.shape}; this tower takes {size} x {size}")
        patches = run([self.stem], pixels.astype(self.class_token.dtype), self.training)
        B, D = patches.shape[0], patches.shape[-1]
        patches = patches.reshape(B, -1, D)
        first = mx.broadcast_to(self.class_token, (B, 1, D))
        if self.norm_pre is None:
            return mx.concatenate([first, patches + self.positions], axis=1)
        return self.norm_pre(mx.concatenate([first, patches], axis=1) + self.positions)

    def pool(self, x: mx.array) -> mx.array:
        """Return the normalised class token of the last layer's output, (B, D)."""
        return self.norm(x[:, 0])
