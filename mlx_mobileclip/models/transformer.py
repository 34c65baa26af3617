"""The pre-norm transformer layer that the ViT image towers and the text towers are made of.

Source: apple/ml-mobileclip 4144bb1 `mobileclip/modules/common/transformer.py`; timm 1.0.31
`timm/models/vision_transformer.py`; open_clip 3.3.0 `transformer.py`. All three agree.
"""

import mlx.core as mx
import mlx.nn as nn

from ..layers import GELU, Linear, self_attention


class TransformerLayer(nn.Module):
    """x = x + proj(attend(norm1(x))), then y = x + fc2(gelu(fc1(norm2(x)))); GELU is exact."""

    def __init__(self, width: int, heads: int, hidden: int, eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps)
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps)
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)
        self.act = GELU()
        self._heads = heads

    def __call__(self, x: mx.array, causal: bool = False) -> mx.array:
        """(B, L, D) to the same shape; `causal` masks later positions."""
        B, L, D = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(B, L, 3, self._heads, D // self._heads)
        x = x + self.proj(self_attention(qkv, causal=causal, training=self.training))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))
