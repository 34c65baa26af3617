"""Attention with a polynomial in place of exp.

Unnecessary once MLX's CPU backend vectorises exp; today it computes one element at a time. The
polynomial is vectorised by compilers, at two to four times the speed.
"""

import mlx.core as mx

from .executor import on_all_cores

E2, E3, E4 = 0.50002435, 0.16602886, 0.04612296  # fitted for the 32nd power of the polynomial


def attention(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, causal: bool
) -> mx.array:
    """softmax(scale q k^T) v; arguments and result as for `layers.attention`."""
    (B, K, L, D), (_, G, S, _) = queries.shape, keys.shape
    queries = (queries * (scale / 32)).reshape(B, G, K // G, L, D)

    def work(start: int, stop: int) -> mx.array:
        visible = S - L + stop if causal else S
        mask = _causal_mask(stop - start, visible) if causal and stop - start > 1 else None
        part = queries[:, :, :, start:stop]
        return _attend(part, keys[:, :, :visible], values[:, :, :visible], mask)

    return on_all_cores(work, L, axis=2, work_size=B * K * L * S)


def _causal_mask(length: int, positions: int) -> mx.array:
    """Additive causal mask for the last L of S positions, (L, S)."""
    queries = mx.arange(positions - length, positions)[:, None]
    return mx.where(queries < mx.arange(positions), mx.finfo(mx.float32).min, 0.0)


def _attend(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | None) -> mx.array:
    """Attention of queries (B, G, K / G, L, D), already scaled by scale / 32, to (B, K, L, D)."""
    B, G, shared, L, D = queries.shape
    scores = queries.reshape(B, G, -1, D) @ keys.swapaxes(-1, -2)
    if mask is not None:
        scores = (scores.reshape(B, G, shared, L, -1) + mask).reshape(B, G, shared * L, -1)
    weights = _exp_of_minus_32(mx.max(scores, axis=-1, keepdims=True) - scores)
    # A column of ones yields the sums of the weights; mx.sum would cost as much as the product.
    y = weights @ mx.pad(values, [(0, 0)] * 3 + [(0, 1)], constant_values=1)
    return (y[..., :-1] / y[..., -1:]).reshape(B, G * shared, L, D)


# Compiled for each shape, as in `elementwise.py`.
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
