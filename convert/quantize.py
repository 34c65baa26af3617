"""Lazy canonical tensors as they are stored: in one precision, some layers packed.

Nothing here is computed before the writer asks for a tensor, so that converting needs memory for
the largest and not for all.
"""

import mlx.core as mx

from mlx_mobileclip.checkpoint import as_dtype
from mlx_mobileclip.quantization import Packed, Quantization

Tensors = dict[str, mx.array]


def as_stored(tensors: Tensors, dtype: mx.Dtype, packed: Packed) -> Tensors:
    """Cast every float tensor, and pack the weights of some layers; empties `tensors`."""
    stored: Tensors = {}
    for name in list(tensors):
        tensor = as_dtype(tensors.pop(name), dtype)
        path, _, kind = name.rpartition(".")
        if kind == "weight" and path in packed:
            stored |= {f"{path}.{key}": value for key, value in packed[path].pack(tensor).items()}
        else:
            stored[name] = tensor
    return stored


def unpacked(tensors: Tensors, packed: Packed) -> Tensors:
    """The same tensors with no layer packed; empties `tensors`."""
    floats: Tensors = {}
    for path, packing in packed.items():
        layer = {
            key: tensors.pop(f"{path}.{key}")
            for key in ("weight", "scales", "biases")
            if f"{path}.{key}" in tensors
        }
        floats[f"{path}.weight"] = unpack(layer, packing, mx.float32)
    floats |= tensors
    tensors.clear()
    return floats


def unpack(layer: Tensors, packing: Quantization, dtype: mx.Dtype) -> mx.array:
    """The weight of a packed layer, floats (rows, width)."""
    return mx.dequantize(
        layer["weight"],
        layer["scales"],
        layer.get("biases"),
        group_size=packing.group_size,
        bits=packing.bits,
        mode=packing.mode,
        dtype=dtype,
    )
