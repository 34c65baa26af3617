"""Read the constants of a program as arrays: plain, palettised, quantised or sparse.

Types and sizes are checked immediately; data is read lazily.

Source of the formats: coremltools 9.0 `converters/mil/mil/ops/defs/iOS16/constexpr_ops.py` and
`iOS18/compression.py`; checked on its output.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import CheckpointError
from .package import Blob

Array = NDArray[Any]

# Data types of MIL: bits per element, and NumPy type of the unpacked values.
# Without bfloat16 and float8, in which coremltools does not write vision weights.
TYPES: dict[int, tuple[int, str]] = {
    1: (8, "?"), 10: (16, "<f2"), 11: (32, "<f4"),
    21: (8, "i1"), 22: (16, "<i2"), 23: (32, "<i4"), 25: (4, "i1"),
    31: (8, "u1"), 32: (16, "<u2"), 33: (32, "<u4"),
    35: (4, "u1"), 36: (2, "u1"), 37: (1, "u1"), 38: (6, "u1"), 39: (3, "u1"),
}  # fmt: skip
# Code in the record of a blob: MIL's code.
BLOB_KINDS = {
    1: 10, 2: 11, 3: 31, 4: 21, 6: 22, 7: 32, 8: 25, 9: 37, 10: 36, 11: 35, 12: 39, 13: 38,
    14: 23, 15: 33,
}  # fmt: skip
MAX_DIMENSIONS = 12  # a blockwise palette has two more than its weight
MAX_ELEMENTS = 1 << 31
MAX_DEPTH = 4  # of constants computed from constants
MAX_TABLES = 256  # entries of lookup tables per element, if each block has a table


@dataclass(frozen=True, slots=True)
class TensorType:
    """Data type and shape of a value.

    Attributes:
        code: MIL's code of the data type; 0 if it is not a tensor.
        shape: Shape; -1 for a size that is not fixed.
    """

    code: int
    shape: tuple[int, ...]

    @property
    def is_float(self) -> bool:
        """Whether the elements are floating-point numbers."""
        return self.code in (10, 11)

    @property
    def elements(self) -> int:
        """Number of elements, at most MAX_ELEMENTS + 1."""
        count = 1
        for size in self.shape:
            count = min(count * max(size, 0), MAX_ELEMENTS + 1)
        return count


@dataclass(frozen=True, slots=True)
class Constant:
    """A constant whose data is read lazily.

    Attributes:
        name: Its name in the program.
        type: Data type and shape.
        read: Function that returns the values, with the shape of `type`.
        depth: Number of constants between it and stored data.
    """

    name: str
    type: TensorType
    read: Callable[[], Array]
    depth: int = 0


Arguments = Mapping[str, Constant]


def from_blob(name: str, type_: TensorType, blob: Blob, where: str) -> Constant:
    """A constant that is stored as a blob; raises CheckpointError if the blob does not match it."""
    kind = BLOB_KINDS.get(blob.kind)
    if kind is None:
        raise _error(where, name, f"has data of the unknown type {blob.kind}")
    if _size_bytes(type_) != len(blob.data):
        raise _error(
            where, name, f"has {len(blob.data)} bytes of data for the shape {list(type_.shape)}"
        )
    if TYPES[kind][0] != TYPES[type_.code][0]:
        raise _error(where, name, "is declared with another data type than its data")
    return Constant(name, type_, lambda: _unpacked(blob.data, type_))


def from_values(name: str, type_: TensorType, values: Array, where: str) -> Constant:
    """A constant whose values, a flat array, are stored in the model file itself."""
    if type_.code in TYPES and values.dtype == np.uint8:  # as bytes
        if _size_bytes(type_) != len(values):
            raise _error(where, name, f"has {len(values)} bytes, which does not match its shape")
        values = _unpacked(values, type_).reshape(-1)
    if type_.is_float and values.dtype.kind != "f":
        raise _error(where, name, "has the type float, but other values")
    if len(values) != type_.elements:
        raise _error(where, name, f"has {len(values)} values for the shape {list(type_.shape)}")
    return Constant(name, type_, lambda: values.reshape(type_.shape))


def decompress(
    kind: str, name: str, type_: TensorType, arguments: Arguments, where: str
) -> Constant:
    """A compressed constant, which an operation decompresses when the model is loaded.

    Args:
        kind: Type of the operation.
        name: Name of the constant.
        type_: Type of the constant, as declared in the program.
        arguments: Arguments of the operation by parameter.
        where: Name of the package in messages.

    Raises:
        CheckpointError: the operation is not supported, or its arguments do not match.
    """
    function = _DECOMPRESSION.get(kind)
    if function is None:
        raise _error(where, name, f"is compressed by {kind}, which is not supported")
    if not type_.is_float or any(size < 1 for size in type_.shape):
        raise _error(where, name, "is compressed, but is not an array of floats")
    depth = 1 + max((constant.depth for constant in arguments.values()), default=0)
    if depth > MAX_DEPTH:
        raise _error(where, name, f"nests constants {depth} levels deep")
    if type_.elements > 64 * sum(c.type.elements for c in arguments.values()):
        raise _error(where, name, f"has too little data for the shape {list(type_.shape)}")
    for parameter, constant in arguments.items():
        tables = MAX_TABLES if constant.type.is_float and not constant.depth else 1
        if constant.type.elements > max(tables * type_.elements, 1):
            raise _error(where, name, f"has a {parameter[:40]!r} larger than itself")

    def read() -> Array:
        try:
            values = function(
                {key: constant.read() for key, constant in arguments.items()}, type_.shape
            )
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise _error(where, name, f"does not fit {kind}: {str(error)[:100]}") from error
        if values.shape != type_.shape:
            raise _error(where, name, f"{kind} gives the shape {values.shape}")
        return values.astype(TYPES[type_.code][1])

    return Constant(name, type_, read, depth)


def _error(where: str, name: str, what: str) -> CheckpointError:
    return CheckpointError(f"{where}: constant {name[:80]!r} {what}; download it again")


def _size_bytes(type_: TensorType) -> int:
    """Size of a value of this type in bytes; -1 if the type is not valid."""
    if type_.code not in TYPES or any(size < 1 for size in type_.shape):
        return -1
    if type_.elements > MAX_ELEMENTS:
        return -1
    return -(-type_.elements * TYPES[type_.code][0] // 8)


def _unpacked(data: NDArray[np.uint8], type_: TensorType) -> Array:
    """Decode bytes to an array; elements smaller than a byte become one byte each."""
    bits, dtype = TYPES[type_.code]
    if bits >= 8:
        return data.view(dtype).reshape(type_.shape)
    count = math.prod(type_.shape)
    stream = np.unpackbits(data, count=count * bits, bitorder="little").reshape(count, bits)
    values = np.packbits(stream, axis=1, bitorder="little").reshape(type_.shape)
    if dtype == "i1":  # two's complement of 4 bits
        return ((values ^ 8) - np.uint8(8)).view(np.int8)
    return values


Parts = dict[str, Array]
Shape = tuple[int, ...]


def _palette(parts: Parts, shape: Shape) -> Array:
    """Look each element up in a table, or in the table of its block."""
    table, indices = parts["lut"], parts["indices"]
    if table.ndim == 1:  # iOS 16: indices with as few bits as the table needs
        bits = len(table).bit_length() - 1
        type_ = TensorType({1: 37, 2: 36, 4: 35, 6: 38, 8: 31}[bits], shape)
        if _size_bytes(type_) != indices.size:
            raise ValueError(f"{indices.size} bytes of indices")
        return np.asarray(table[_unpacked(indices.astype(np.uint8).reshape(-1), type_)])
    if table.shape[-1] != 1 or indices.shape != shape or table.ndim != len(shape) + 2:
        raise ValueError(f"a table of shape {table.shape}")
    if indices.max() >= table.shape[-2]:
        raise ValueError("an index beyond the table")
    rows = np.arange(math.prod(table.shape[:-2])).reshape(table.shape[:-2])
    return np.asarray(table.reshape(-1, table.shape[-2])[_repeat_blocks(rows, shape), indices])


def _affine(parts: Parts, shape: Shape) -> Array:
    """Compute (quantised - zero point) * scale, per tensor or per channel (iOS 16)."""
    values, axis = parts["quantized_data"].astype(np.float32), int(parts["axis"])
    channel = [1] * values.ndim
    channel[axis] = -1
    zero, scale = (
        parts[name].astype(np.float32).reshape(channel if parts[name].ndim else ())
        for name in ("zero_point", "scale")
    )
    return np.asarray((values - zero) * scale)


def _blockwise(parts: Parts, shape: Shape) -> Array:
    """Compute (quantised - offset) * scale, per block (iOS 18)."""
    values = parts["data"].astype(np.float32)
    if "offset" in parts:
        values = values - _repeat_blocks(parts["offset"].astype(np.float32), values.shape)
    return np.asarray(values * _repeat_blocks(parts["scale"].astype(np.float32), values.shape))


def _sparse(parts: Parts, shape: Shape) -> Array:
    """Values where the mask is set, zeros elsewhere."""
    values, mask = parts["nonzero_data"], parts["mask"]
    if mask.shape != shape:  # iOS 16: packed bits
        type_ = TensorType(37, shape)
        if _size_bytes(type_) != mask.size:
            raise ValueError(f"a mask of {mask.size} bytes")
        mask = _unpacked(mask.astype(np.uint8).reshape(-1), type_)
    if np.count_nonzero(mask) != values.size:
        raise ValueError(f"{values.size} values for {np.count_nonzero(mask)} places")
    result = np.zeros(shape, values.dtype)
    result[mask != 0] = values.reshape(-1)
    return result


def _cast(parts: Parts, shape: Shape) -> Array:
    return parts["source_val"]


def _repeat_blocks(values: Array, shape: Shape) -> Array:
    """Repeat the value of each block for all its elements."""
    if values.ndim != len(shape) or any(n % m for n, m in zip(shape, values.shape, strict=True)):
        raise ValueError(f"blocks of shape {values.shape}")
    for axis, size in enumerate(shape):
        if values.shape[axis] not in (1, size):
            values = np.repeat(values, size // values.shape[axis], axis)
    return np.broadcast_to(values, shape)


_DECOMPRESSION: dict[str, Callable[[Parts, Shape], Array]] = {
    "constexpr_lut_to_dense": _palette,
    "constexpr_affine_dequantize": _affine,
    "constexpr_blockwise_shift_scale": _blockwise,
    "constexpr_sparse_to_dense": _sparse,
    "constexpr_cast": _cast,
}
