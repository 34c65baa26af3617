"""The Qwen2 decoder (arXiv:2407.10671) of FastVLM.

Queries, keys and values come from one fused layer, as do the two halves of the SwiGLU: with
fewer, larger matrix products a decode step is faster. The model protocol is mlx-lm's
(`layers`, `make_cache`, `__call__(inputs, cache, input_embeddings)`).

Reference code: transformers 4.48 `models/qwen2/modeling_qwen2.py`.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_mobileclip.layers import Embedding, Linear, attention, swiglu

from .config import Qwen2Config
from .kv_cache import STEP, KVCache, QuantizedKVCache


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        rows = (self._heads + 2 * self._kv_heads) * config.head_dim
        self.qkv_proj = Linear(config.hidden_size, rows)
        self.o_proj = Linear(config.hidden_size, config.hidden_size, bias=False)
        self.rope = nn.RoPE(config.head_dim, base=config.rope_theta)

    def __call__(self, x: mx.array, mask: mx.array | str | None, cache: Any) -> mx.array:
        """(B, L, D) to (B, L, D)."""
        B, L, _ = x.shape
        heads = self.qkv_proj(x).reshape(B, L, self._heads + 2 * self._kv_heads, -1)
        heads = heads.transpose(0, 2, 1, 3)  # (B, heads, L, head_dim)
        rotated, values = mx.split(heads, [self._heads + self._kv_heads], axis=1)
        rotated = self.rope(rotated, offset=0 if cache is None else cache.offset)
        queries, keys = mx.split(rotated, [self._heads], axis=1)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        out = self._attend(queries, keys, values, cache, mask)
        return self.o_proj(out.transpose(0, 2, 1, 3).reshape(B, L, -1))

    def _attend(
        self, queries: mx.array, keys: Any, values: Any, cache: Any, mask: mx.array | str | None
    ) -> mx.array:
        if cache is not None and hasattr(cache, "bits"):  # mlx-lm's QuantizedKVCache: triples
            options = {"group_size": cache.group_size, "bits": cache.bits}
            keys, values = mx.dequantize(*keys, **options), mx.dequantize(*values, **options)
        scale = queries.shape[-1] ** -0.5
        if isinstance(mask, mx.array):
            return mx.fast.scaled_dot_product_attention(
                queries, keys, values, scale=scale, mask=mask
            )
        causal = mask == "causal"
        return attention(queries, keys, values, scale, causal=causal, training=self.training)


class MLP(nn.Module):
    """SwiGLU: y = down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """(B, L, D) to (B, L, D)."""
        return self.down_proj(swiglu(self.gate_up_proj(x), self.training))


class DecoderLayer(nn.Module):
    """Pre-norm attention and SwiGLU, each with a residual."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(self, x: mx.array, mask: mx.array | str | None, cache: Any) -> mx.array:
        """(B, L, D) to (B, L, D), extending the cache."""
        x = x + self.self_attn(self.input_layernorm(x), mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen2(nn.Module):
    """Embedding, decoder layers, final norm and output layer."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._group_size = 64 if config.head_dim % 64 == 0 else 32  # of quantised keys and values
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Linear(config.hidden_size, config.vocab_size, bias=False)
        )

    def make_cache(self, capacity: int = STEP, bits: int | None = None) -> list[KVCache]:
        """One empty cache per layer for `capacity` tokens; floats if `bits` is None."""
        if bits is None:
            return [KVCache(capacity) for _ in self.layers]
        return [QuantizedKVCache(capacity, bits, self._group_size) for _ in self.layers]

    def embed(self, ids: mx.array) -> mx.array:
        """Embed token ids: (B, L) to (B, L, D)."""
        # MLX dequantises mxfp and nvfp to bfloat16, which with float16 would promote to float32.
        return self.embed_tokens(ids).astype(self.norm.weight.dtype)

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
        *,
        last_only: bool = False,
    ) -> mx.array:
        """Logits of the token after each position.

        Args:
            inputs: Token ids, (B, L); ignored when embeddings are given.
            cache: One cache per layer, extended in place; None to attend within inputs only.
            input_embeddings: (B, L, D), used instead of `inputs`.
            last_only: Compute the logits of the last position alone.

        Returns:
            (B, L, V), or (B, 1, V) with `last_only`.
        """
        x = self.embed(inputs) if input_embeddings is None else input_embeddings
        caches: list[Any] = [None] * len(self.layers) if cache is None else cache
        length = x.shape[1]
        if caches[0] is None:
            mask: mx.array | str | None = "causal" if length > 1 else None
        else:
            mask = caches[0].make_mask(length, return_array=False, window_size=None)
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            x = layer(x, mask, layer_cache)
        x = self.norm(x[:, -1:] if last_only else x)
        return self.embed_tokens.as_linear(x) if self.lm_head is None else self.lm_head(x)
