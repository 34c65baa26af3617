"""Attention of all positions to all, in the form that is fast on the device at hand."""

import mlx.core as mx

from .device import on_cpu, on_metal

# Metal's fused attention takes heads of 64 but none of 32. From so many positions on it is worth
# padding them: scores that stay out of memory outweigh twice the products (an estimate from
# bytes and FLOPs; `python -m bench mac` measures it).
PAD_HEADS_FROM = 512
# MLX's CPU backend computes exp one element at a time. From so many positions on, in float32, it
# is worth replacing by products, which compilers turn into vector instructions.
SOFTMAX_FROM = 256


def attend(qkv: mx.array) -> mx.array:
    """softmax(q k^T / sqrt D) v.

    Args:
        qkv: (B, N, 3, K, D): queries, keys and values of K heads.

    Returns:
        (B, N, K * D).
    """
    B, N, _, K, D = qkv.shape
    if D == 32 and N >= PAD_HEADS_FROM and on_metal():
        qkv = mx.pad(qkv, [(0, 0)] * 4 + [(0, 32)])
    queries, keys, values = qkv.transpose(2, 0, 3, 1, 4)  # each (B, K, N, D), or padded
    if N >= SOFTMAX_FROM and qkv.dtype == mx.float32 and on_cpu():
        y = _by_products(queries * D**-0.5, keys, values)
    else:
        y = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=D**-0.5)
    return y[..., :D].transpose(0, 2, 1, 3).reshape(B, N, K * D)


def _by_products(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    """The same of queries that are scaled already."""
    scores = queries @ keys.swapaxes(-1, -2)
    weights = _exp(scores - mx.max(scores, axis=-1, keepdims=True))
    return (weights @ values) / mx.sum(weights, axis=-1, keepdims=True)


def _exp(x: mx.array) -> mx.array:
    """e^x for x <= 0 to 6e-6; 1e-35 from -80 on."""
    return _sixty_fourth_power(_exp_of_sixty_fourth(x))


# Two functions, as MLX compiles no more than eleven operations in a row; compiled for each shape
# anew, as in `gelu.py`.
@mx.compile
def _exp_of_sixty_fourth(x: mx.array) -> mx.array:
    t = x / 64
    t = 0.5 * (t - 1.25 + mx.abs(t + 1.25))  # no less than -1.25; see `gelu.py`
    z = t * t
    return (1 + t) + z * ((1 / 2 + t / 6) + z * (1 / 24 + t / 120))


@mx.compile
def _sixty_fourth_power(x: mx.array) -> mx.array:
    x = x * x
    x = x * x
    x = x * x
    x = x * x
    x = x * x
    return x * x
