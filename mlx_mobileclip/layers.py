"""Layers of the models, with fast implementations for each device.

This is the only model code that depends on the device. Training uses plain MLX operations. A GPU
uses them too, with a few kernels in `gpu/`. A CPU uses `cpu/`, often only in float32, and there a
feature map may be an array or `Rows`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .cpu import attention as cpu_attention
from .cpu import depthwise, elementwise, executor, matmul, stem
from .cpu.rows import FeatureMap as FeatureMap
from .cpu.rows import Rows, map_rows, positionwise
from .cpu.rows import whole as whole
from .derived import derived
from .device import on_cpu, on_metal
from .gpu import depthwise as gpu_depthwise
from .gpu import elementwise as gpu_elementwise
from .gpu.attention import pad_heads_from
from .gpu.queue import WorkQueue


def _on_cpu_in_float32(x: FeatureMap, training: bool) -> bool:
    return not training and x.dtype == mx.float32 and on_cpu()


# Convolutions.


class DepthwiseConv(nn.Module):
    """Depthwise k x k convolution with "same" padding and no bias."""

    def __init__(self, channels: int, kernel_size: int, stride: int = 1):
        """Create a kernel of zeros; the stride is 1 or 2."""
        super().__init__()
        self.weight = mx.zeros((channels, kernel_size, kernel_size, 1))
        self.stride = stride

    def kernels(self) -> list[mx.array]:
        """Return [kernel], (C, k, k, 1)."""
        return [self.weight]

    def __call__(self, x: FeatureMap, bias: mx.array | None = None) -> FeatureMap:
        """(B, H, W, C) to (B, H/s, W/s, C), sizes rounded up; adds a bias if one is given."""
        return _depthwise(x, self, bias)


class DepthwiseKernel(nn.Module):
    """One of the kernels of a `DepthwiseConvDouble`."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        self.weight = mx.zeros((channels, kernel_size, kernel_size, 1))


class DepthwiseConvDouble(nn.Module):
    """Grouped k x k convolution with two outputs per channel.

    Stored as two depthwise kernels, for even and odd output channels, because MLX's fast Metal
    kernel supports only one output per channel.
    """

    def __init__(self, channels: int, kernel_size: int, stride: int = 1):
        super().__init__()
        self.even = DepthwiseKernel(channels, kernel_size)
        self.odd = DepthwiseKernel(channels, kernel_size)
        self.bias = mx.zeros((2 * channels,))
        self.stride = stride

    def kernels(self) -> list[mx.array]:
        """Return the even and odd kernels, (C, k, k, 1) each."""
        return [self.even.weight, self.odd.weight]

    def __call__(self, x: FeatureMap, bias: mx.array | None = None) -> FeatureMap:
        """(B, H, W, C) to (B, H/s, W/s, 2C); adds `bias` if given, but not `self.bias`."""
        return _depthwise(x, self, bias)


def _depthwise(
    x: FeatureMap, layer: DepthwiseConv | DepthwiseConvDouble, bias: mx.array | None
) -> FeatureMap:
    """Apply the layer's kernels; the outputs of each channel are adjacent."""
    if not layer.training and _custom_kernel_supports(x, layer):
        weights = layer.kernels() if bias is None else [*layer.kernels(), bias]
        weight, biases = derived(layer, _custom_kernel, weights)
        return gpu_depthwise.depthwise_conv(whole(x), weight, biases, layer.stride)[0]
    y = _conv(x, layer)
    return y if bias is None else y + bias


def _conv(x: FeatureMap, layer: DepthwiseConv | DepthwiseConvDouble) -> FeatureMap:
    """Convolve without a bias, with MLX or `cpu/`."""
    kernels, stride = layer.kernels(), layer.stride
    channels, kernel_size = kernels[0].shape[:2]
    if kernels[0].dtype == mx.float32 and _on_cpu_in_float32(x, layer.training):
        matrix = derived(layer, _banded_matrix, kernels)
        return depthwise.depthwise_conv(x, matrix, kernel_size, stride)
    x = whole(x)
    ys = [mx.conv2d(x, kernel, stride, kernel_size // 2, groups=channels) for kernel in kernels]
    return ys[0] if len(ys) == 1 else mx.stack(ys, axis=-1).reshape(*ys[0].shape[:3], -1)


def conv_add_biases(
    x: FeatureMap, mixer: nn.Module, next_bias: mx.array
) -> tuple[FeatureMap, FeatureMap]:
    """`add_biases` of a depthwise convolution; the custom kernel fuses both.

    Args:
        x: (B, H, W, C).
        mixer: Has `conv`, a `DepthwiseConv`, and `bias`.
        next_bias: (C,).
    """
    conv = mixer.conv
    if mixer.training or not _custom_kernel_supports(x, conv):
        return add_biases(conv(x), mixer, next_bias)
    weight, biases = derived(mixer, _custom_mixer, [conv.weight, mixer.bias, next_bias])
    first, second = gpu_depthwise.depthwise_conv(whole(x), weight, biases, conv.stride)
    return first, second


def _custom_kernel_supports(x: FeatureMap, layer: DepthwiseConv | DepthwiseConvDouble) -> bool:
    """Whether the custom GPU kernel is enabled and supports this layer."""
    kernels = layer.kernels()
    return gpu_depthwise.use_own() and gpu_depthwise.supports(whole(x), kernels[0], len(kernels))


# Values derived from weights. Each function takes the layer and the weights it depends on.


def _banded_matrix(layer: nn.Module, kernels: list[mx.array]) -> mx.array:
    return depthwise.banded_matrix(kernels, layer.stride)


def _custom_kernel(layer: nn.Module, weights: list[mx.array]) -> tuple[mx.array, mx.array]:
    """Weights and biases for the custom kernel; the bias is zero if none is given."""
    count = len(layer.kernels())
    weight, bias = gpu_depthwise.arranged(weights[:count]), weights[count:]
    return weight, bias[0].astype(mx.float32)[None] if bias else mx.zeros((1, weight.shape[1]))


def _custom_mixer(layer: nn.Module, weights: list[mx.array]) -> tuple[mx.array, mx.array]:
    kernel, *biases = weights
    return gpu_depthwise.arranged([kernel]), _summed_biases(layer, biases)


def _summed_biases(layer: nn.Module, biases: list[mx.array]) -> mx.array:
    """Return the first bias and the sum of both, float32 (2, C)."""
    first, second = (bias.astype(mx.float32) for bias in biases)
    return mx.stack([first, first + second])


def prepare(model: nn.Module) -> None:
    """Compute in advance what layers derive at first use, so that threads can share the model.

    Args:
        model: A model with evaluated weights.
    """
    layers = (DepthwiseConv, DepthwiseConvDouble) if on_cpu() else ()
    for layer in model.modules():
        if isinstance(layer, layers) and layer.kernels()[0].dtype == mx.float32:
            derived(layer, _banded_matrix, layer.kernels())


class StemConv(nn.Conv2d):
    """3x3 convolution of RGB pixels with stride 2, padding 1 and no bias."""

    def __init__(self, channels: int):
        super().__init__(3, channels, 3, stride=2, padding=1, bias=False)

    def __call__(self, pixels: mx.array) -> FeatureMap:
        """(B, H, W, 3) to (B, H/2, W/2, C), sizes rounded up."""
        if self.training or not on_cpu():
            return super().__call__(pixels)
        return stem.conv3x3_stride2(pixels, self.weight)


# Matrix products.


class Linear(nn.Linear):
    """y = x W^T + b."""

    def __call__(self, x: Any) -> Any:
        """(..., C) to (..., K)."""
        if isinstance(x, Rows):
            return map_rows(self, x)
        if self.training or not on_cpu():
            return super().__call__(x)
        return matmul.linear(x, self.weight, self.get("bias"))

    def to_quantized(self, *args: Any, **kwargs: Any) -> Any:
        """Return the quantised layer; arguments as for `mx.quantize`."""
        return QuantizedLinear.from_linear(self, *args, **kwargs)


class QuantizedLinear(nn.QuantizedLinear):
    """y = x W^T + b with quantised weights."""

    def __call__(self, x: Any) -> Any:
        """(..., C) to (..., K)."""
        if isinstance(x, Rows):
            return map_rows(self, x)
        y = _quantized_product(x, self)
        return y + self.bias if "bias" in self else y


class Embedding(nn.Embedding):
    """Token embeddings; `as_linear` uses them as the output layer."""

    def as_linear(self, x: mx.array) -> mx.array:
        """(..., L, D) to logits (..., L, V)."""
        if self.training or not on_cpu():
            return x @ self.weight.T
        return matmul.linear(x, self.weight)

    def to_quantized(self, *args: Any, **kwargs: Any) -> Any:
        """Return the quantised layer; arguments as for `mx.quantize`."""
        return QuantizedEmbedding.from_embedding(self, *args, **kwargs)


class QuantizedEmbedding(nn.QuantizedEmbedding):
    """Token embeddings with quantised weights."""

    def as_linear(self, x: mx.array) -> mx.array:
        """(..., L, D) to logits (..., L, V)."""
        return _quantized_product(x, self)


def _quantized_product(x: mx.array, layer: nn.Module) -> mx.array:
    """Return x W^T, without the layer's bias."""
    arrays = [layer["weight"], layer["scales"], layer.get("biases")]
    quantization = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    if layer.training or not on_cpu():
        return mx.quantized_matmul(x, *arrays, **quantization)
    return matmul.quantized_linear(x, arrays, quantization)


@positionwise
def add_product(residual: mx.array, x: mx.array, layer: nn.Module) -> mx.array:
    """Return residual + x W^T as one operation, without the layer's bias.

    Args:
        residual: (..., K).
        x: (..., C).
        layer: A `Linear` or `QuantizedLinear`.

    Returns:
        (..., K).
    """
    if isinstance(layer, QuantizedLinear):
        return residual + _quantized_product(x, layer)
    flat, y = x.reshape(-1, x.shape[-1]), residual.reshape(-1, residual.shape[-1])
    if layer.training or not on_cpu():
        y = mx.addmm(y, flat, layer.weight.T)
    else:
        y = matmul.linear(flat, layer.weight, y)
    return y.reshape(residual.shape)


# Elementwise functions.


class GELU(nn.Module):
    """x * (1 + erf(x / sqrt 2)) / 2: the exact GELU, used in training all models here."""

    def __call__(self, x: Any, bias: mx.array | None = None) -> Any:
        """GELU of x, or of x + bias: any shape to the same shape."""
        if isinstance(x, Rows):
            return map_rows(self, x, bias)
        if _on_cpu_in_float32(x, self.training):
            return elementwise.gelu(x if bias is None else x + bias)
        return gpu_elementwise.gelu(x) if bias is None else gpu_elementwise.bias_gelu(x, bias)


def swiglu(gate_up: mx.array, training: bool) -> mx.array:
    """silu(gate) * up.

    Args:
        gate_up: (B, L, 2 I), the gate first.
        training: Whether the model is in training mode.

    Returns:
        (B, L, I).
    """
    gate, up = mx.split(gate_up, 2, axis=-1)
    plain = not _on_cpu_in_float32(gate, training)
    return (gpu_elementwise if plain else elementwise).swiglu(gate, up)


def global_average_pool(x: mx.array) -> mx.array:
    """(B, H, W, C) to (B, C), summed in float32: float16 would overflow on large maps."""
    return mx.mean(x.astype(mx.float32), axis=(1, 2)).astype(x.dtype)


def add_biases(
    x: FeatureMap, layer: nn.Module, next_bias: mx.array
) -> tuple[FeatureMap, FeatureMap]:
    """Return x plus the layer's `bias`, and that sum plus `next_bias`; one kernel on a GPU."""
    if layer.training or on_cpu():
        return _add_biases(x, layer.bias, next_bias)
    biases = derived(layer, _summed_biases, [layer.bias, next_bias])
    first, second = gpu_elementwise.add_biases(whole(x), biases)
    return first, second


@positionwise
def _add_biases(x: mx.array, bias: mx.array, next_bias: mx.array) -> tuple[mx.array, mx.array]:
    x = x + bias
    return x, x + next_bias


# Attention.


def self_attention(qkv: mx.array, *, causal: bool = False, training: bool) -> mx.array:
    """Self-attention of K heads.

    Args:
        qkv: (B, N, 3, K, D): queries, keys and values.
        causal: Whether to mask later positions.
        training: Whether the model is in training mode.

    Returns:
        (B, N, K * D).
    """
    B, N, _, K, D = qkv.shape
    if D == 32 and on_metal() and pad_heads_from() <= N:
        qkv = mx.pad(qkv, [(0, 0)] * 4 + [(0, 32)])
    queries, keys, values = qkv.transpose(2, 0, 3, 1, 4)  # each (B, K, N, D), or padded
    y = attention(queries, keys, values, D**-0.5, causal=causal, training=training)
    return y[..., :D].transpose(0, 2, 1, 3).reshape(B, N, K * D)


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    *,
    causal: bool,
    training: bool,
) -> mx.array:
    """softmax(scale q k^T) v.

    Args:
        queries: (B, K, L, D), for the last L of S positions.
        keys: (B, G, S, D); K / G query heads share a key head.
        values: (B, G, S, D).
        scale: Factor on the scores.
        causal: Whether to mask later positions.
        training: Whether the model is in training mode.

    Returns:
        (B, K, L, D).
    """
    if _on_cpu_in_float32(queries, training):
        return cpu_attention.attention(queries, keys, values, scale, causal)
    mask = "causal" if causal else None
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


# Sequences of layers.


def run(layers: Sequence[Callable[[Any], Any]], x: mx.array, training: bool) -> mx.array:
    """Apply layers in sequence to a batch.

    On a GPU they are queued in pieces, which bounds memory. On a CPU each layer divides the items
    among the cores. With fewer items than cores, layers parallelise internally instead.
    """
    if not (training or on_cpu()):
        queue = WorkQueue()
        for layer in layers:
            for part in layer.parts() if hasattr(layer, "parts") else (layer,):
                x = part(x)
                queue.add(x)
        return x
    if training or len(x) < executor.cores():
        for layer in layers:
            x = layer(x)
        return whole(x)
    for layer in layers:
        x = executor.by_items(partial(_whole_output, layer), x)
    return x


def _whole_output(layer: Callable[[Any], Any], x: mx.array) -> mx.array:
    return whole(layer(x))
