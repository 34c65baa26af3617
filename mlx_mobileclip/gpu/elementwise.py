"""Elementwise functions, fused into one kernel each, that round to half precision only once.

Those with several arrays are compiled for each shape: with `shapeless=True` MLX would split their
float32 forms into several kernels (MLX 0.32.4 mlx/compile.cpp, max_compile_depth).
"""

from functools import partial

import mlx.core as mx
import mlx.nn as nn

from ..concurrency import register_thread
from ..device import backend


@partial(mx.compile, shapeless=True)
def gelu(x: mx.array) -> mx.array:
    """Exact GELU, x * (1 + erf(x / sqrt 2)) / 2, in float32."""
    return _gelu(x.astype(mx.float32)).astype(x.dtype)


@mx.compile
def bias_gelu(x: mx.array, bias: mx.array) -> mx.array:
    """GELU of x + bias, in float32."""
    return _gelu(x.astype(mx.float32) + bias).astype(x.dtype)


def _gelu(x: mx.array) -> mx.array:
    return x * (1 + mx.erf(x / 2**0.5)) / 2


@mx.compile
def add_biases(x: mx.array, biases: mx.array) -> mx.array:
    """Add each of several biases to a feature map, in float32.

    Args:
        x: (B, H, W, C).
        biases: float32 (N, C).

    Returns:
        (N, B, H, W, C) in the dtype of x.
    """
    return (x[None] + biases[:, None, None, None]).astype(x.dtype)


@partial(mx.compile, shapeless=True)
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up."""
    return nn.silu(gate) * up


def compile_all(dtype: mx.Dtype) -> None:
    """Compile every function for a dtype on a GPU, in advance of its first use.

    MLX caches kernels for the whole process, so a thread can call this while weights load.
    """
    if backend() == "cpu":  # kernels are cached on disk there
        return
    register_thread()
    x, bias = mx.zeros((1, 1, 1, 8), dtype), mx.zeros((8,), dtype)
    biases = mx.zeros((2, 8))
    mx.eval(gelu(x), bias_gelu(x, bias), add_biases(x, biases), swiglu(x, x))
