"""Compare each operation in `layers.py` with its definition, on random inputs.

This covers the kernels that the device would use, whether or not the model needs them. Definitions
use MLX's basic operations, in float32 on the CPU.
"""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..checkpoints.weights import as_dtype
from ..gpu import depthwise as gpu_depthwise
from ..layers import (
    GELU,
    DepthwiseConv,
    DepthwiseConvDouble,
    Linear,
    StemConv,
    add_biases,
    add_product,
    attention,
    global_average_pool,
    self_attention,
    swiglu,
    whole,
)
from ..quantization import MODES, Quantization, dequantize
from .compare import Row, on_device, on_reference_device, relative_error

MAP = (1, 24, 24, 96)  # shape of a feature map; 576 positions are enough for padded heads
CACHE_LENGTH = 700  # keys for a single query
QUANTIZED_SHAPE = (256, 512)


class Form(NamedTuple):
    """An operation and its definition.

    Attributes:
        name: Name in the report.
        shapes: Shapes of its inputs.
        device: The operation as models use it.
        definition: The same in basic operations.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    device: Callable[..., mx.array]
    definition: Callable[..., mx.array]


def _gelu(x: mx.array) -> mx.array:
    return 0.5 * x * (1 + mx.erf(x / 2**0.5))


def _attention(q: mx.array, k: mx.array, v: mx.array, causal: bool) -> mx.array:
    """softmax(q k^T / sqrt(D)) v of (B, K, L, D), (B, G, S, D) and (B, G, S, D)."""
    k, v = (mx.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = q @ k.transpose(0, 1, 3, 2) / q.shape[-1] ** 0.5
    L, S = scores.shape[-2:]
    if causal:
        later = mx.arange(S)[None] > mx.arange(S - L, S)[:, None]
        scores = mx.where(later, -float("inf"), scores)
    return mx.softmax(scores, axis=-1) @ v


def _self_attention(qkv: mx.array) -> mx.array:
    B, N, _, K, D = qkv.shape
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)
    y = _attention(q, k, v, causal=False)
    return y.transpose(0, 2, 1, 3).reshape(B, N, K * D)


def _module(build: Callable[[], nn.Module], *names: str) -> Callable[..., mx.array]:
    """Return a function of a layer's input and of its parameters with these names."""

    def run(x: mx.array, *weights: mx.array) -> mx.array:
        layer = build()
        layer.load_weights(list(zip(names, weights, strict=True)), strict=False)
        layer.eval()
        return whole(layer(x))

    return run


def _add_product(residual: mx.array, x: mx.array, weight: mx.array) -> mx.array:
    layer = Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = weight
    layer.eval()
    return whole(add_product(residual, x, layer))


def _double_conv(x: mx.array, even: mx.array, odd: mx.array) -> mx.array:
    """Grouped convolution of stride 2 with two outputs per channel."""
    weight = mx.stack([even, odd], axis=1).reshape(-1, *even.shape[1:])
    return mx.conv2d(x, weight, 2, even.shape[1] // 2, groups=x.shape[-1])


def _add_biases(x: mx.array, bias: mx.array, next_bias: mx.array) -> mx.array:
    layer = nn.Module().eval()
    layer.bias = bias
    return mx.stack([whole(y) for y in add_biases(x, layer, next_bias)])


def _own_conv(stride: int, x: mx.array, *weights: mx.array) -> mx.array:
    """Our own kernel, of one or two depthwise kernels and as many biases."""
    *kernels, biases = weights
    weight = gpu_depthwise.arranged(kernels)
    return gpu_depthwise.depthwise_conv(x, weight, biases.astype(mx.float32), stride)


def _grouped_conv(stride: int, x: mx.array, *weights: mx.array) -> mx.array:
    """Grouped convolution plus each of the biases, the definition of `_own_conv`."""
    *kernels, biases = weights
    weight = mx.stack(kernels, axis=1).reshape(-1, *kernels[0].shape[1:])
    y = mx.conv2d(x, weight, stride, weight.shape[1] // 2, groups=x.shape[-1])
    return y + biases[:, None, None, None]


def _quantized_weight(mode: str) -> dict[str, mx.array]:
    """A random quantised weight; its bfloat16 scales are exact in float16 and float32 too."""
    weight = np.random.default_rng(1).standard_normal(QUANTIZED_SHAPE, np.float32)
    with on_reference_device():
        stored = Quantization.of(mode).quantize(mx.array(weight))
        return {name: as_dtype(value, mx.bfloat16) for name, value in stored.items()}


def _quantized_product(x: mx.array, mode: str) -> mx.array:
    layer = Linear(*QUANTIZED_SHAPE[::-1], bias=False).to_quantized(**asdict(Quantization.of(mode)))
    layer.load_weights(
        [(name, as_dtype(v, x.dtype)) for name, v in _quantized_weight(mode).items()]
    )
    return whole(layer.eval()(x))


def _dequantized_product(x: mx.array, mode: str) -> mx.array:
    stored = {name: as_dtype(value, mx.float32) for name, value in _quantized_weight(mode).items()}
    return x @ dequantize(stored, Quantization.of(mode), mx.float32).T


C = MAP[-1]
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64
QUERIES, KEYS = (1, HEADS, 48, HEAD_DIM), (1, KV_HEADS, 48, HEAD_DIM)
LONG_KEYS = (1, KV_HEADS, CACHE_LENGTH, HEAD_DIM)
FORMS = (
    Form(
        "stem convolution",
        ((1, 96, 96, 3), (C, 3, 3, 3)),
        _module(partial(StemConv, C), "weight"),
        lambda x, w: mx.conv2d(x, w, 2, 1),
    ),
    *(
        Form(
            f"depthwise {size}x{size}, stride {stride}",
            (MAP, (C, size, size, 1)),
            _module(partial(DepthwiseConv, C, size, stride), "weight"),
            partial(lambda x, w, s: mx.conv2d(x, w, s, w.shape[1] // 2, groups=C), s=stride),
        )
        for size, stride in ((3, 1), (3, 2), (7, 1))
    ),
    Form(
        "depthwise pair",
        (MAP, (C, 7, 7, 1), (C, 7, 7, 1)),
        _module(partial(DepthwiseConvDouble, C, 7, 2), "even.weight", "odd.weight"),
        _double_conv,
    ),
    Form("GELU", (MAP,), lambda x: GELU().eval()(x), _gelu),
    Form(
        "GELU with bias",
        (MAP, (C,)),
        lambda x, b: whole(GELU().eval()(x, b)),
        lambda x, b: _gelu(x + b),
    ),
    Form(
        "two biases", (MAP, (C,), (C,)), _add_biases, lambda x, b, c: mx.stack([x + b, x + b + c])
    ),
    Form(
        "SwiGLU",
        ((1, 48, 2 * C),),
        lambda x: swiglu(x, False),
        lambda x: x[..., :C] * mx.sigmoid(x[..., :C]) * x[..., C:],
    ),
    Form(
        "mean of positions",
        (MAP,),
        global_average_pool,
        lambda x: x.sum(axis=(1, 2)) / (MAP[1] * MAP[2]),
    ),
    Form(
        "product with bias",
        (MAP, (4 * C, C), (4 * C,)),
        _module(partial(Linear, C, 4 * C), "weight", "bias"),
        lambda x, w, b: x @ w.T + b,
    ),
    Form(
        "product without bias",
        (MAP, (4 * C, C)),
        _module(partial(Linear, C, 4 * C, bias=False), "weight"),
        lambda x, w: x @ w.T,
    ),
    Form("product added", (MAP, MAP, (C, C)), _add_product, lambda r, x, w: r + x @ w.T),
    Form(
        "causal attention",
        (QUERIES, KEYS, KEYS),
        lambda q, k, v: attention(q, k, v, HEAD_DIM**-0.5, causal=True, training=False),
        partial(_attention, causal=True),
    ),
    Form(
        "attention of one query",
        ((1, HEADS, 1, HEAD_DIM), LONG_KEYS, LONG_KEYS),
        lambda q, k, v: attention(q, k, v, HEAD_DIM**-0.5, causal=False, training=False),
        partial(_attention, causal=False),
    ),
    Form(
        "attention in heads of 32",
        ((1, MAP[1] * MAP[2], 3, C // 32, 32),),
        lambda qkv: self_attention(qkv, training=False),
        _self_attention,
    ),
    *(
        Form(
            f"{mode} product of {rows}",
            ((1, rows, QUANTIZED_SHAPE[1]),),
            partial(_quantized_product, mode=mode),
            partial(_dequantized_product, mode=mode),
        )
        for mode in MODES
        for rows in (1, 48)
    ),
)
# A candidate, which models use only where `gpu_depthwise.use_own` says so.
GPU_FORMS = tuple(
    Form(
        f"own {name} {size}x{size}, stride {stride}",
        (MAP, *[(C, size, size, 1)] * kernels, (biases, kernels * C)),
        partial(_own_conv, stride),
        partial(_grouped_conv, stride),
    )
    for name, size, stride, kernels, biases in (
        ("depthwise with two biases,", 3, 1, 1, 2),
        ("depthwise", 3, 2, 1, 1),
        ("depthwise", 7, 1, 1, 1),
        ("depthwise pair", 7, 2, 2, 1),
        ("depthwise pair", 3, 1, 2, 1),
    )
)


def compare_form(form: Form, dtype: mx.Dtype, bound: float) -> list[Row]:
    """Compare an operation with its definition on random inputs.

    Args:
        form: One of FORMS or, on a GPU, GPU_FORMS.
        dtype: dtype on the device.
        bound: Upper bound of the rounding error.
    """
    rng = np.random.default_rng(0)
    inputs = [mx.array(rng.standard_normal(s, np.float32)).astype(dtype) for s in form.shapes]
    with on_reference_device():
        exact = form.definition(*(x.astype(mx.float32) for x in inputs))
        mx.eval(exact)
    actual, failure = on_device(partial(form.device, *inputs))
    error = float("nan") if actual is None else relative_error(exact, actual)
    return [Row(form.name, "", error, bound, failure=failure)]
