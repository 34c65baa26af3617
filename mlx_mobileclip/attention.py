"""Attention, in the form that is fast on the device at hand."""

import os

import mlx.core as mx

from .device import on_all_cores, on_cpu, on_metal
from .errors import ModelError

PAD_HEADS_FROM = 512  # estimated from bytes and FLOPs; `python -m bench mac` measures it
E2, E3, E4 = 0.50002435, 0.16602886, 0.04612296  # fitted: the power makes much of what is left out


def attend(qkv: mx.array, causal: bool = False) -> mx.array:
    """Self-attention of K heads.

    Args:
        qkv: (B, N, 3, K, D): queries, keys and values.
        causal: Hide from each position those after it.

    Returns:
        (B, N, K * D).
    """
    B, N, _, K, D = qkv.shape
    if D == 32 and on_metal() and pad_heads_from() <= N:
        qkv = mx.pad(qkv, [(0, 0)] * 4 + [(0, 32)])
    queries, keys, values = qkv.transpose(2, 0, 3, 1, 4)  # each (B, K, N, D), or padded
    y = attend_to(queries, keys, values, D**-0.5, causal)
    return y[..., :D].transpose(0, 2, 1, 3).reshape(B, N, K * D)


def pad_heads_from() -> int:
    """From how many positions on heads of 32 are padded to 64 on Metal.

    Its fused attention takes heads of 64 but none of 32. For long inputs, scores that stay out of
    memory outweigh twice the products.

    Returns:
        $MLX_MOBILECLIP_PAD_HEADS_FROM if it is set, or 512.

    Raises:
        ModelError: it is not a number.
    """
    chosen = os.environ.get("MLX_MOBILECLIP_PAD_HEADS_FROM")
    if not chosen:
        return PAD_HEADS_FROM
    if not chosen.isdecimal() or len(chosen) > 9:
        raise ModelError(
            f"MLX_MOBILECLIP_PAD_HEADS_FROM is {chosen[:20]!r}; set it to a number of positions, "
            f"such as {PAD_HEADS_FROM}, or not at all"
        )
    return int(chosen)


def attend_to(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, causal: bool
) -> mx.array:
    """softmax(scale q k^T) v.

    MLX's CPU backend computes exp one element at a time. There, in float32, it is replaced by
    products, which compilers turn into vector instructions, at two to four times the speed.

    Args:
        queries: (B, K, L, D), of the last L of S positions.
        keys: (B, G, S, D); K / G heads of queries share one of keys.
        values: The same shape.
        scale: Of the scores.
        causal: Hide from each position those after it.

    Returns:
        (B, K, L, D).
    """
    if queries.dtype != mx.float32 or not on_cpu():
        mask = "causal" if causal else None
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
    (B, K, L, D), (_, G, S, _) = queries.shape, keys.shape
    queries = (queries * (scale / 32)).reshape(B, G, K // G, L, D)

    def work(start: int, stop: int) -> mx.array:
        seen = S - L + stop if causal else S
        hidden = _after_each(stop - start, seen) if causal and stop - start > 1 else None
        part = queries[:, :, :, start:stop]
        return _by_products(part, keys[:, :, :seen], values[:, :, :seen], hidden)

    return on_all_cores(work, L, axis=2, makes=B * K * L * S)


def _after_each(length: int, positions: int) -> mx.array:
    """What to add to scores to hide from the last positions those after each."""
    queries = mx.arange(positions - length, positions)[:, None]
    return mx.where(queries < mx.arange(positions), mx.finfo(mx.float32).min, 0.0)


def _by_products(
    queries: mx.array, keys: mx.array, values: mx.array, hidden: mx.array | None
) -> mx.array:
    """The same of queries (B, G, K / G, L, D) that are scaled already, and divided by 32."""
    B, G, shared, L, D = queries.shape
    scores = queries.reshape(B, G, -1, D) @ keys.swapaxes(-1, -2)
    if hidden is not None:
        scores = (scores.reshape(B, G, shared, L, -1) + hidden).reshape(B, G, shared * L, -1)
    weights = _exp_of_minus_32(mx.max(scores, axis=-1, keepdims=True) - scores)
    # With a column of ones to sum the weights up, which costs MLX as much as a product.
    y = weights @ mx.pad(values, [(0, 0)] * 3 + [(0, 1)], constant_values=1)
    return (y[..., :-1] / y[..., -1:]).reshape(B, G * shared, L, D)


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
