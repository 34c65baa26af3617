"""Attention, in the form that is fast on the device at hand."""

import mlx.core as mx
from mlx import nn

from .device import on_all_cores, on_cpu, on_metal

# Metal's fused attention takes heads of 64 but none of 32. From so many positions on it is worth
# padding them: scores that stay out of memory outweigh twice the products (an estimate from
# bytes and FLOPs; `python -m bench mac` measures it).
PAD_HEADS_FROM = 512
E2, E3, E4 = 0.50002435, 0.16602886, 0.04612296  # fitted: the power makes much of what is left out


def attend(qkv: mx.array, causal: bool = False) -> mx.array:
    """softmax(q k^T / sqrt D) v.

    MLX's CPU backend computes exp one element at a time. There, in float32, it is replaced by
    products, which compilers turn into vector instructions, at two to four times the speed.

    Args:
        qkv: (B, N, 3, K, D): queries, keys and values of K heads.
        causal: Hide from each position those after it.

    Returns:
        (B, N, K * D).
    """
    B, N, _, K, D = qkv.shape
    if D == 32 and N >= PAD_HEADS_FROM and on_metal():
        qkv = mx.pad(qkv, [(0, 0)] * 4 + [(0, 32)])
    queries, keys, values = qkv.transpose(2, 0, 3, 1, 4)  # each (B, K, N, D), or padded
    if qkv.dtype == mx.float32 and on_cpu():
        queries *= D**-0.5 / 32

        def work(i: int, j: int) -> mx.array:
            return _by_products(queries[:, i:j], keys[:, i:j], values[:, i:j], causal)

        y = on_all_cores(work, K, axis=1, makes=B * K * N * N)
    else:
        mask = "causal" if causal else None
        y = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=D**-0.5, mask=mask)
    return y[..., :D].transpose(0, 2, 1, 3).reshape(B, N, K * D)


def _by_products(queries: mx.array, keys: mx.array, values: mx.array, causal: bool) -> mx.array:
    """The same of queries that are scaled already, and divided by 32."""
    scores = queries @ keys.swapaxes(-1, -2)
    if causal:
        scores += nn.MultiHeadAttention.create_additive_causal_mask(scores.shape[-1])
    weights = _exp_of_minus_32(mx.max(scores, axis=-1, keepdims=True) - scores)
    return (weights @ values) / mx.sum(weights, axis=-1, keepdims=True)


# Compiled for each shape anew, as in `gelu.py`.
@mx.compile
def _exp_of_minus_32(x: mx.array) -> mx.array:
    """e^(-32 x) for x >= 0: 1 / (1 + x + E2 x^2 + E3 x^3 + E4 x^4)^32, to 4e-6."""
    x2 = x * x
    p = ((1 + x) + E2 * x2) + (E3 * x + E4 * x2) * x2
    p = p * p
    p = p * p
    p = p * p
    p = p * p
    p = p * p
    return 1 / p
