"""Exact GELU, x * (1 + erf(x / sqrt 2)) / 2, in the form that is fast on the device at hand.

MLX's CPU backend computes erf one element at a time. There, in float32, erf is replaced by a
rational function of products and sums, which compilers turn into vector instructions; the result
differs by at most 2e-6. GPUs, and half precision, whose range it would leave, keep erf.
"""

from functools import partial

import mlx.core as mx
import mlx.nn as nn

from .device import on_cpu

# erf(t / sqrt 2) / 2 = t * P(t^2) / Q(t^2) for |t| <= 5.6, beyond which it is 1/2 to 1e-8; fitted
# by least squares with the weights drawn towards the largest error (Lawson's method).
LIMIT = 5.6
P = (
    0.398942126, 0.0371126189, 0.00458756021, 0.000182467746, 3.36155005e-06, -2.19965797e-08,
    1.08021088e-10,
)  # fmt: skip
Q = (1.0, 0.259691663, 0.0297860473, 0.00190147962, 6.62475296e-05)


def gelu(x: mx.array) -> mx.array:
    """Exact GELU of an array of any shape."""
    return _rational(x) if _is_slow(x) else nn.gelu(x)


def bias_gelu(x: mx.array, bias: mx.array) -> mx.array:
    """Exact GELU of x + bias; on a GPU in one kernel."""
    return _rational(x + bias) if _is_slow(x) else _bias_gelu(x, bias)


def _is_slow(x: mx.array) -> bool:
    return x.dtype == mx.float32 and on_cpu()


# Compiled for each shape anew: only then does MLX know that elements lie side by side, without
# which nothing is vectorised. An added bias would spoil that too.
@mx.compile
def _rational(x: mx.array) -> mx.array:
    # max(|x|, LIMIT), written with abs: MLX's maximum looks for NaN, which stops vectorisation.
    size = mx.abs(x)
    size = 0.5 * (size + LIMIT + mx.abs(size - LIMIT))
    t = x * (LIMIT / size)  # x, clamped
    z = t * t
    z2 = z * z
    z4 = z2 * z2
    above = ((P[0] + P[1] * z) + z2 * (P[2] + P[3] * z)) + z4 * ((P[4] + P[5] * z) + z2 * P[6])
    below = ((Q[0] + Q[1] * z) + z2 * (Q[2] + Q[3] * z)) + z4 * Q[4]
    return x * (0.5 + t * above / below)


@partial(mx.compile, shapeless=True)
def _bias_gelu(x: mx.array, bias: mx.array) -> mx.array:
    # The erf form: these towers were trained with it, and the pass is bandwidth bound.
    x = x + bias
    return x * (1 + mx.erf(x / 2**0.5)) / 2
