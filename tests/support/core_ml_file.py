"""Write small Core ML packages without coremltools: messages, blobs, operations.

Field numbers are those of coremltools' MIL.proto. Values are NumPy arrays, numbers, strings or
lists of numbers; float arrays of more than one element are stored in weight.bin.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
TYPES = {"float32": 11, "float16": 10, "int32": 23, "bool": 1, "int8": 21, "uint8": 31}
TYPES |= {"int64": 23, "uint32": 33}
BLOB_KINDS = {10: 1, 11: 2, 31: 3, 21: 4, 25: 8, 37: 9, 36: 10, 35: 11, 39: 12, 38: 13}
BLOB_KINDS[33] = 15
BITS = {25: 4, 35: 4, 36: 2, 37: 1, 38: 6, 39: 3}  # of types that NumPy lacks

Reference = str  # the name of a value


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def put(number: int, value: int | bytes | str) -> bytes:
    """Encode one field: a varint, or length-delimited bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def entry(number: int, key: str, value: bytes) -> bytes:
    return put(number, put(1, key) + put(2, value))


def tensor_type(code: int, shape: tuple[int, ...]) -> bytes:
    sizes = b"".join(put(3, put(1, put(1, size))) for size in shape)
    return put(1, put(1, code) + put(2, len(shape)) + sizes)


def packed_bits(values: np.ndarray, bits: int) -> bytes:
    """Pack elements into `bits` bits each, the first in the lowest bits."""
    flat = (values.reshape(-1).astype(np.int64) & ((1 << bits) - 1)).astype(np.uint8)
    stream = np.unpackbits(flat[:, None], axis=1, bitorder="little")[:, :bits]
    return np.packbits(stream.reshape(-1), bitorder="little").tobytes()


class Program:
    """Builds an ML program operation by operation."""

    def __init__(self, dtype: str = "float32"):
        self.dtype = dtype
        self.operations: list[bytes] = []
        self.inputs = b""
        self.blobs = b""
        self.count = 0
        self.shapes: dict[str, tuple[int, ...]] = {}

    # Values

    def blob(self, data: bytes, kind: int) -> int:
        """Append a blob; returns the offset of its record."""
        offset = 64 + len(self.blobs)
        record = struct.pack("<IIQQQ", 0xDEADBEEF, kind, len(data), offset + 64, 0)
        data += bytes(-len(data) % 64)
        self.blobs += record.ljust(64, b"\0") + data
        return offset

    def stored(self, array: np.ndarray, code: int | None = None) -> bytes:
        """A value in weight.bin, of a NumPy type or one of `BITS`."""
        code = code or TYPES[array.dtype.name]
        data = packed_bits(array, BITS[code]) if code in BITS else array.tobytes()
        offset = self.blob(data, BLOB_KINDS[code])
        file = put(1, "@model_path/weights/weight.bin") + put(2, offset)
        return put(2, tensor_type(code, array.shape)) + put(5, file)

    def value(self, value: Any) -> bytes:
        if isinstance(value, bytes):
            return value
        if isinstance(value, str):
            return put(2, tensor_type(2, ())) + put(3, put(1, put(4, put(1, value))))
        array = np.asarray(value)
        if array.dtype.kind == "f" and array.size > 1:
            return self.stored(array.astype(self.dtype) if array.dtype != np.float16 else array)
        if array.dtype.kind == "f":
            scalar = array.astype(self.dtype)
            data = put(7, put(1, scalar.tobytes()))
            if scalar.dtype == np.float32:
                data = put(1, put(1, scalar.tobytes()))
            return put(2, tensor_type(TYPES[self.dtype], array.shape)) + put(3, put(1, data))
        numbers = b"".join(varint(int(n)) for n in array.reshape(-1))
        number = 3 if array.dtype == np.bool_ else 2
        kind = tensor_type(TYPES[array.dtype.name], array.shape)
        return put(2, kind) + put(3, put(1, put(number, put(1, numbers))))

    # Operations

    def name(self, kind: str) -> str:
        self.count += 1
        return f"{kind}_{self.count}"

    def input(self, name: str, shape: tuple[int, ...], code: int = 11) -> Reference:
        self.inputs += put(1, put(1, name) + put(2, tensor_type(code, shape)))
        self.shapes[name] = shape
        return name

    def raw(
        self,
        kind: str,
        inputs: Mapping[str, Any],
        attributes: Mapping[str, Any] | None = None,
        shape: tuple[int, ...] = (),
        name: str | None = None,
        code: int | None = None,
        extra: bytes = b"",
    ) -> Reference:
        """An operation; an input is the name of a value, or a list of them."""
        name = name or self.name(kind)
        data = put(1, kind)
        for parameter, given in inputs.items():
            names = given if isinstance(given, list) else [given]
            data += entry(2, parameter, b"".join(put(1, put(1, n)) for n in names))
        output = put(1, name) + put(2, tensor_type(code or TYPES[self.dtype], shape))
        data += put(3, output)
        for parameter, value in (attributes or {}).items():
            data += entry(5, parameter, self.value(value))
        self.operations.append(data + extra)
        self.shapes[name] = shape
        return name

    def const(self, value: Any, name: str | None = None) -> Reference:
        data = self.value(value)
        array = np.asarray(value) if not isinstance(value, bytes) else np.zeros(())
        return self.raw("const", {}, {"val": data}, array.shape, name or self.name("const"))

    def op(self, kind: str, shape: tuple[int, ...] = (), **parameters: Any) -> Reference:
        """An operation; parameters that do not name a value become constants."""
        inputs = {}
        for parameter, given in parameters.items():
            known = isinstance(given, str) and given in self.shapes
            several = isinstance(given, list) and all(isinstance(g, str) for g in given)
            inputs[parameter] = given if known or several else self.const(given)
        return self.raw(kind, inputs, shape=shape)

    # Files

    def model(self, outputs: list[str] | None = None, **functions: bytes) -> bytes:
        names = outputs if outputs is not None else list(self.shapes)[-1:]
        block = b"".join(put(2, name) for name in names)
        block += b"".join(put(3, operation) for operation in self.operations)
        function = self.inputs + put(2, "CoreML6") + entry(3, "CoreML6", block)
        program = put(1, 1) + entry(2, "main", function)
        program += b"".join(entry(2, name, data) for name, data in functions.items())
        return put(1, 7) + put(502, program)

    def weights(self) -> bytes:
        return struct.pack("<II", 1, 2).ljust(64, b"\0") + self.blobs

    def write(self, path: Path) -> Path:
        return write_package(path, self.model(), self.weights())


def write_package(path: Path, model: bytes, weights: bytes) -> Path:
    for name, data in {MODEL: model, WEIGHTS: weights}.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    model_id = f"model of {path.name}"  # unique to the package
    entries = {
        model_id: {"name": "model.mlmodel", "path": "com.apple.CoreML/model.mlmodel"},
        "weights": {"name": "weights", "path": "com.apple.CoreML/weights"},
    }
    manifest = {"fileFormatVersion": "1.0.0", "itemInfoEntries": entries}
    (path / "Manifest.json").write_text(json.dumps(manifest | {"rootModelIdentifier": model_id}))
    return path
