"""Exact GELU, x * (1 + erf(x / sqrt 2)) / 2, in the form that is fast on the device at hand.

MLX's CPU backend computes erf one element at a time. There, in float32, it is replaced by products
and sums, which compilers turn into vector instructions; the result differs by at most 1e-6. GPUs,
and half precision, whose range it would leave, keep erf.
"""

from functools import partial

import mlx.core as mx
import mlx.nn as nn

from .device import on_cpu

# erfc(a / sqrt 2) = 1 / (1 + C1 a + C2 a^2 + C3 a^3 + C4 a^4 + C5 a^5 + C8 a^8)^8 for a >= 0, much
# like Abramowitz and Stegun's 7.1.28; fitted to the least of GELU's largest errors, 4.5e-7.
C1, C2, C3 = 9.97538167e-02, 4.46420640e-02, 8.95779501e-03
C4, C5, C8 = 5.38788660e-04, 3.94775606e-04, 1.83369300e-06


def gelu(x: mx.array) -> mx.array:
    """Exact GELU of an array of any shape."""
    return _by_products(x) if _is_slow(x) else nn.gelu(x)


def bias_gelu(x: mx.array, bias: mx.array) -> mx.array:
    """Exact GELU of x + bias; on a GPU in one kernel."""
    return _by_products(x + bias) if _is_slow(x) else _bias_gelu(x, bias)


def _is_slow(x: mx.array) -> bool:
    return x.dtype == mx.float32 and on_cpu()


# Compiled for each shape anew: only then does MLX know that elements lie side by side, without
# which nothing is vectorised. An added bias would spoil that too, and so would one more operation
# in a row: MLX fuses eleven.
@mx.compile
def _by_products(x: mx.array) -> mx.array:
    a = mx.abs(x)
    a2 = x * x
    a4 = a2 * a2
    p = (1 + C1 * a) + (C2 + C3 * a) * a2 + (C4 + C5 * a + C8 * a4) * a4
    p = p * p
    p = p * p
    p = p * p
    return 0.5 * (x + a) - (0.5 * a) / p  # max(x, 0) - a erfc(a / sqrt 2) / 2


@partial(mx.compile, shapeless=True)
def _bias_gelu(x: mx.array, bias: mx.array) -> mx.array:
    # The erf form: these towers were trained with it, and the pass is bandwidth bound.
    x = x + bias
    return x * (1 + mx.erf(x / 2**0.5)) / 2
