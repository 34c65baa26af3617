"""Convert lazy canonical tensors to the form to store: one dtype, some layers quantised.

Nothing is computed before a tensor is written, so that peak memory is that of the largest tensor.
"""

import mlx.core as mx

from mlx_mobileclip.checkpoints.source import Tensors
from mlx_mobileclip.checkpoints.weights import as_dtype
from mlx_mobileclip.quantization import QuantizedLayers, dequantize


def as_stored(tensors: Tensors, dtype: mx.Dtype, quantized: QuantizedLayers) -> Tensors:
    """Cast every float tensor and quantise the weights of some layers.

    Args:
        tensors: Canonical tensors; emptied.
        dtype: dtype of tensors that are not quantised, and of scales.
        quantized: Quantisation of each layer to quantise.
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
    """Dequantise all quantised layers to float32.

    Args:
        tensors: Canonical tensors; emptied.
        quantized: Quantisation of each quantised layer.
    """
    floats: Tensors = {}
    for path, quantization in quantized.items():
        names = {key: f"{path}.{key}" for key in ("weight", "scales", "biases")}
        layer = {key: tensors.pop(name) for key, name in names.items() if name in tensors}
        floats[names["weight"]] = dequantize(layer, quantization, mx.float32)
    floats |= tensors
    tensors.clear()
    return floats
