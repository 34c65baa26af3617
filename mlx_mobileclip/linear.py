"""Linear layers, in the form that is fast on the device at hand."""

import mlx.core as mx
import mlx.nn as nn

from .device import on_cpu


class Linear(nn.Linear):
    """y = x W^T + b.

    MLX's CPU backend spreads the bias over the rows one number at a time, which takes as long as
    multiplying by a short row of weights. `take` copies it whole.
    """

    def __call__(self, x: mx.array) -> mx.array:
        """(..., C) to (..., K)."""
        if "bias" not in self or self.training or not on_cpu():
            return super().__call__(x)
        rows = x.flatten(0, -2)
        biases = mx.take(self.bias[None], mx.zeros(len(rows), mx.uint32), axis=0)
        return mx.addmm(biases, rows, self.weight.T).reshape(*x.shape[:-1], len(self.weight))


def add_product(residual: mx.array, x: mx.array, layer: nn.Module) -> mx.array:
    """Add x @ W.T to the residual, without the layer's bias; (N, C) and (N, K)."""
    if isinstance(layer, nn.QuantizedLinear):
        product = mx.quantized_matmul(
            x,
            layer["weight"],
            scales=layer["scales"],
            biases=layer.get("biases"),
            group_size=layer.group_size,
            bits=layer.bits,
            mode=layer.mode,
        )
        return residual + product
    return mx.addmm(residual, x, layer.weight.T)
