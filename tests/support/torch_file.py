"""Write files in the format of `torch.save` without torch; their pickles are built by hand."""

import struct
import zipfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

END = b"."
STORAGES = {
    mx.float32: "FloatStorage",
    mx.float16: "HalfStorage",
    mx.bfloat16: "BFloat16Storage",
    mx.int64: "LongStorage",
}


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def name(module: str, attribute: str) -> bytes:
    return b"c" + f"{module}\n{attribute}\n".encode()


def tuple_of(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def numbers(values: Any) -> bytes:
    return tuple_of(*(integer(int(v)) for v in values))


def storage(key: str, kind: str, items: int) -> bytes:
    key_tuple = tuple_of(
        text("storage"), name("torch", kind), text(key), text("cpu"), integer(items)
    )
    return key_tuple + b"Q"


def tensor(place: bytes, offset: int, shape: Any, strides: Any) -> bytes:
    hooks = name("collections", "OrderedDict") + b")R"
    arguments = tuple_of(place, integer(offset), numbers(shape), numbers(strides), b"\x89", hooks)
    return name("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


def dictionary(items: dict[str, bytes], ordered: bool = True) -> bytes:
    start = name("collections", "OrderedDict") + b")R" if ordered else b"}"
    return start + b"(" + b"".join(text(k) + v for k, v in items.items()) + b"u"


def metadata(value: bytes) -> bytes:
    """Add the attribute _metadata, which the state_dict of a module has."""
    return value + b"}" + text("_metadata") + b"}sb"


def contiguous(shape: Any) -> list[int]:
    return [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]


def pickle_of(value: bytes) -> bytes:
    return b"\x80\x02" + value + END


def write_zip(path: Path, pickled: bytes, storages: dict[str, bytes], **others: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", others.get("byteorder", b"little"))
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", b"3\n")
    return path


def raw(value: np.ndarray, dtype: mx.Dtype) -> tuple[bytes, mx.Dtype]:
    if value.dtype == np.int64:
        return value.tobytes(), mx.int64
    if dtype == mx.bfloat16:
        return np.asarray(mx.array(value).astype(dtype).view(mx.uint16)).tobytes(), dtype
    kind = np.float16 if dtype == mx.float16 else np.float32
    return value.astype(kind).tobytes(), dtype


def write_torch(
    path: Path,
    tensors: dict[str, np.ndarray],
    dtype: mx.Dtype = mx.float32,
    wrapper: str | None = None,
) -> Path:
    """A checkpoint file; `wrapper` puts the tensors under a key, beside other values."""
    entries, storages = {}, {}
    for i, (key, value) in enumerate(tensors.items()):
        data, kind = raw(value, dtype)
        storages[str(i)] = data
        place = storage(str(i), STORAGES[kind], value.size)
        entries[key] = tensor(place, 0, value.shape, contiguous(value.shape))
    state = metadata(dictionary(entries))
    if wrapper is not None:
        others = {"epoch": integer(3), wrapper: state, "best": b"G" + struct.pack(">d", 0.5)}
        state = dictionary(others, ordered=False)
    return write_zip(path, pickle_of(state), storages)
