"""Linear layers, in the form that is fast on the device at hand."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .device import LARGEST_PART, on_all_cores, on_cpu

BLOCK = 64  # rows of weights; products of more are no faster
UNPACK_FROM = 6  # rows


class Linear(nn.Linear):
    """y = x W^T + b.

    MLX's CPU backend spreads the bias over the rows one number at a time, which takes as long as
    multiplying by a short row of weights. `take` copies it whole.
    """

    def __call__(self, x: mx.array) -> mx.array:
        """(..., C) to (..., K)."""
        bias = self.get("bias")
        if self.training or not on_cpu():
            return super().__call__(x)
        if bias is None:
            return multiply(x, self.weight)
        if x.size == x.shape[-1]:
            return multiply(x, self.weight) + bias
        rows = x.flatten(0, -2)
        biases = mx.take(bias[None], mx.zeros(len(rows), mx.uint32), axis=0)
        return mx.addmm(biases, rows, self.weight.T).reshape(*x.shape[:-1], len(self.weight))

    def to_quantized(self, *packing: Any, **named: Any) -> Any:
        """Pack the weights, as `mx.quantize` takes them."""
        return QuantizedLinear.from_linear(self, *packing, **named)


def multiply(x: mx.array, weight: mx.array) -> mx.array:
    """X W^T, (..., C) to (..., K).

    With a single row all the time goes into reading the weights. OpenBLAS, given blocks so small
    that it leaves each to one thread, reads them at twice the speed (AMD EPYC, two cores, MLX
    0.32.4, 2026-11-23).
    """
    outputs, inputs = weight.shape
    if x.size != inputs or outputs % BLOCK or not on_cpu():
        return x @ weight.T
    blocks = weight.reshape(-1, BLOCK, inputs).swapaxes(1, 2)

    def work(start: int, stop: int) -> mx.array:
        return x.reshape(1, inputs) @ blocks[start:stop]

    makes = min(weight.size, LARGEST_PART)  # nothing large; enough for all cores if weights are
    return on_all_cores(work, len(blocks), axis=0, makes=makes).reshape(*x.shape[:-1], outputs)


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
    return mx.addmm(residual, x, layer.weight.T)
