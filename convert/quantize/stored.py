"""Lazy canonical tensors in the form they are stored in: one dtype, some layers quantised.

Nothing is computed before a tensor is written, so that converting needs memory for the largest
tensor only.
"""

import mlx.core as mx

from mlx_mobileclip.checkpoints.source import Tensors
from mlx_mobileclip.checkpoints.weights import as_dtype
from mlx_mobileclip.quantization import QuantizedLayers, dequantize


def as_stored(tensors: Tensors, dtype: mx.Dtype, quantized: QuantizedLayers) -> Tensors:
    """Cast every float tensor and quantise the weights of some layers.

    Args:
        tensors: Canonical tensors; emptied.
        dtype: Of the tensors that are not quantised, and of scales.
        quantized: Layers to quantise, and how.
    """
    stored: Tensors = {}
    for name in list(tensors):
        tensor = as_dtype(tensors.pop(name), dtype)
        path, _, kind = name.rpartition(".")
        if kind == "weight" and path in quantized:
            stored |= {
                f"{path}.{key}": value for key, value in quantized[path].quantize(tensor).items()
            }
        else:
            stored[name] = tensor
    return stored


def dequantized(tensors: Tensors, quantized: QuantizedLayers) -> Tensors:
    """Turn quantised layers into float32 weights.

    Args:
        tensors: Canonical tensors; emptied.
        quantized: Layers that are quantised, and how.
    """
    floats: Tensors = {}
    for path, quantization in quantized.items():
        names = {key: f"{path}.{key}" for key in ("weight", "scales", "biases")}
        layer = {key: tensors.pop(name) for key, name in names.items() if name in tensors}
        floats[names["weight"]] = dequantize(layer, quantization, mx.float32)
    floats |= tensors
    tensors.clear()
    return floats
