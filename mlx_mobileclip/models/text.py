"""Text towers: the plain transformer of thirteen variants, and MobileCLIP-S0's hybrid.

There is no padding mask: non-causal towers were trained to attend to the padding after the text,
so ids are always padded to the context length, 77.

Source: apple/ml-mobileclip 4144bb1 `mobileclip/text_encoder.py`,
`mobileclip/modules/text/repmixer.py`; open_clip 3.3.0 `transformer.py` (TextTransformer);
MobileCLIP (arXiv:2311.17049, section 4.1).
"""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..json_fields import Fields
from ..layers import GELU, Linear, run
from .transformer import TransformerLayer

EPS = 1e-5
KERNEL_SIZE = 11  # of the hybrid's convolutions along the text


@dataclass(frozen=True, slots=True)
class TextConfig:
    """Architecture of a text tower.

    Attributes:
        width: Channels.
        layers: Transformer layers.
        heads: Attention heads.
        vocab_size: Rows of the token embedding.
        context_length: Ids per text, including padding.
        causal: Whether attention is causal.
        rep_mixers: Whether there is a RepMixer block before and after the transformer layers.
    """

    width: int
    layers: int
    heads: int
    vocab_size: int
    context_length: int
    causal: bool
    rep_mixers: bool

    def to_json(self) -> dict[str, Any]:
        """Return the `text_config` of a canonical config.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Fields) -> "TextConfig":
        """Read and check a `text_config`; raises ConfigError naming the field at fault."""
        config = cls(
            width=fields.integer("width", 1, 8192),
            layers=fields.integer("layers", 1, 256),
            heads=fields.integer("heads", 1, 256),
            vocab_size=fields.integer("vocab_size", 2, 1_000_000),
            context_length=fields.integer("context_length", 2, 4096),
            causal=fields.boolean("causal"),
            rep_mixers=fields.boolean("rep_mixers"),
        )
        if config.width % config.heads:
            raise fields.error("width", f"is not a multiple of heads, {config.heads}")
        return config


class DepthwiseText(nn.Module):
    """Depthwise 1D convolution of size 11, "same" padding, no bias."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = mx.zeros((channels, KERNEL_SIZE, 1))

    def __call__(self, x: mx.array) -> mx.array:
        """(B, L, C) to the same shape."""
        # Explicit padding: MLX's fast kernel for this convolution does not pad.
        margin = KERNEL_SIZE // 2
        x = mx.pad(x, [(0, 0), (margin, margin), (0, 0)])
        return mx.conv1d(x, self.weight, groups=x.shape[-1])


class RepMixerBlock(nn.Module):
    """x = mixer(x) + bias, then y = x + fc2(gelu(fc1(conv(x)))).

    The mixer's residual, BatchNorm and layer scales are folded into the weights.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.mixer = DepthwiseText(channels)
        self.bias = mx.zeros((channels,))
        self.conv = DepthwiseText(channels)
        self.fc1 = Linear(channels, 4 * channels)
        self.fc2 = Linear(4 * channels, channels)
        self.act = GELU()

    def __call__(self, x: mx.array, causal: bool = False) -> mx.array:
        """(B, L, C) to the same shape; convolutions are not causal, so `causal` must be False."""
        assert not causal
        x = self.mixer(x) + self.bias
        return x + self.fc2(self.act(self.fc1(self.conv(x))))


class TextTower(nn.Module):
    """Token and position embeddings, layers, LayerNorm of the end token, projection."""

    def __init__(self, config: TextConfig, embed_dim: int):
        super().__init__()
        width = config.width
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.positions = mx.zeros((config.context_length, width))
        layers: list[nn.Module] = [
            TransformerLayer(width, config.heads, 4 * width, EPS) for _ in range(config.layers)
        ]
        if config.rep_mixers:
            layers = [RepMixerBlock(width), *layers, RepMixerBlock(width)]
        self.layers = layers
        self.norm = nn.LayerNorm(width, EPS)
        self.projection = Linear(width, embed_dim, bias=False)
        self.causal = config.causal

    def __call__(self, ids: mx.array) -> mx.array:
        """Embed texts.

        Args:
            ids: (B, L), padded with 0; the end token is the largest id.

        Returns:
            (B, E).
        """
        layers = [partial(layer, causal=self.causal) for layer in self.layers]
        x = run(layers, self.embed(ids), self.training)
        return self.pool(x, ids)

    def embed(self, ids: mx.array) -> mx.array:
        """Return the input of the first layer, (B, L, D)."""
        # Quantised embeddings may be bfloat16, and bfloat16 + float16 would be float32.
        return self.embedding(ids).astype(self.positions.dtype) + self.positions

    def pool(self, x: mx.array, ids: mx.array) -> mx.array:
        """Project the last layer's output at the end tokens to (B, E)."""
        ends = mx.argmax(ids, axis=-1)
        return self.projection(self.norm(x[mx.arange(len(ids)), ends]))
