"""Linear layers, in the form that is fast on the device at hand."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .device import LARGEST_PART, PARALLEL_FROM, on_all_cores, on_cpu

BLOCKS = (128, 64, 32)  # rows of weights
UNCOPIED = 1_000_000  # products of numbers; OpenBLAS multiplies smaller matrices as they lie
UNPACK_FROM = 6  # rows


class Linear(nn.Linear):
    """y = x W^T + b."""

    def __call__(self, x: mx.array) -> mx.array:
        """(..., C) to (..., K)."""
        if self.training or not on_cpu():
            return super().__call__(x)
        return _on_cpu(x, self.weight, self.get("bias"))

    def to_quantized(self, *packing: Any, **named: Any) -> Any:
        """Pack the weights, as `mx.quantize` takes them."""
        return QuantizedLinear.from_linear(self, *packing, **named)


def multiply(x: mx.array, weight: mx.array) -> mx.array:
    """X W^T, (..., C) to (..., K)."""
    return _on_cpu(x, weight) if on_cpu() else x @ weight.T


def _on_cpu(x: mx.array, weight: mx.array, added: mx.array | None = None) -> mx.array:
    """X W^T plus what is added, a bias (K,) or as many rows (N, K), each core doing some of K."""
    outputs, inputs = weight.shape
    if x.ndim != 2:  # MLX takes time even for a reshape that changes nothing
        y = _on_cpu(x.reshape(-1, inputs), weight, added)
        return y.reshape(*x.shape[:-1], outputs)
    most = UNCOPIED // max(1, x.size)
    block = next((n for n in BLOCKS if n <= most and outputs % n == 0), None)
    if block is None:
        return _in_stripes(x, weight, added)
    y = _in_blocks(x, weight, block)
    return y if added is None else y + added


def _in_blocks(x: mx.array, weight: mx.array, block: int) -> mx.array:
    """X W^T of few rows, (N, C) to (N, K), when nearly all the time goes into reading the weights.

    OpenBLAS copies weights before it multiplies, unless the product is small. In blocks that are,
    one row takes half the time, and 25 rows four fifths (AMD EPYC, two cores, MLX 0.32.4,
    OpenBLAS 0.3.21, 2026-11-25).
    """
    blocks = weight.reshape(-1, block, weight.shape[1]).swapaxes(1, 2)

    def work(start: int, stop: int) -> mx.array:
        return x[None] @ blocks[start:stop]

    y = on_all_cores(work, len(blocks), axis=0, makes=min(weight.size, PARALLEL_FROM))
    return y.swapaxes(0, 1).reshape(len(x), len(weight))


def _in_stripes(x: mx.array, weight: mx.array, added: mx.array | None) -> mx.array:
    """X W^T plus what is added, (N, C) to (N, K)."""

    def work(start: int, stop: int) -> mx.array:
        part = weight[start:stop].T
        if added is None:
            return x @ part
        if added.ndim == 1:  # addmm would spread it one number at a time
            return x @ part + added[start:stop]
        return mx.addmm(added[:, start:stop], x, part)

    # Little is made of much: 16 multiplications weigh as an element elsewhere.
    makes = min(x.size * len(weight) // 16, PARALLEL_FROM)
    return on_all_cores(work, len(weight), axis=-1, makes=makes)


class QuantizedLinear(nn.QuantizedLinear):
    """y = x W^T + b with packed weights."""

    def __call__(self, x: mx.array) -> mx.array:
        """(..., C) to (..., K)."""
        y = multiply_packed(x, self)
        return y + self.bias if "bias" in self else y


def multiply_packed(x: mx.array, layer: nn.Module) -> mx.array:
    """X W^T, (..., C) to (..., K), of a layer with packed weights, without its bias.

    MLX's CPU backend unpacks the weights anew for each row, and adds up in the precision of the
    input. To unpack them once and leave the product to BLAS takes 300 rows a fortieth of the time
    in float32 (AMD EPYC, two cores, MLX 0.32.4 with OpenBLAS, 2026-11-23), and in half precision
    has a thirtieth of the error.
    """
    packed: list[Any] = [layer["weight"], layer["scales"], layer.get("biases")]
    packing = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    if not on_cpu():
        return mx.quantized_matmul(x, *packed, **packing)
    inputs, outputs = x.shape[-1], len(layer.weight)
    few = x.dtype == mx.float32 and x.size < UNPACK_FROM * inputs

    def work(start: int, stop: int) -> mx.array:
        part: list[Any] = [None if array is None else array[start:stop] for array in packed]
        if few:
            return mx.quantized_matmul(x, *part, **packing)
        return x @ mx.dequantize(*part, **packing).astype(x.dtype).T

    makes = outputs * inputs
    return on_all_cores(work, outputs, axis=-1, makes=min(makes, LARGEST_PART) if few else makes)


def add_product(residual: mx.array, x: mx.array, layer: nn.Module) -> mx.array:
    """Add x @ W.T to the residual, without the layer's bias; (N, C) and (N, K)."""
    if isinstance(layer, QuantizedLinear):
        return residual + multiply_packed(x, layer)
    if on_cpu():
        return _on_cpu(x, layer.weight, residual)
    return mx.addmm(residual, x, layer.weight.T)
