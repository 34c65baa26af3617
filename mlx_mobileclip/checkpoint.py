"""Files of a checkpoint directory, read as hostile input: JSON, safetensors, and their limits.

MLX's own safetensors reader accepts files whose shapes wrap around, overlap or are negative, so
every header is first checked by the reference implementation (`safetensors.safe_open`).
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from .errors import CheckpointError, ConfigError, name_some

MAX_CONFIG_BYTES = 1 << 20
MAX_INDEX_BYTES = 16 << 20
MAX_DIMENSIONS = 4
MAX_SHARD_BYTES = 5 << 30
MAX_HEADER_BYTES = 4 << 20  # ten times what the largest checkpoint needs
SHARD_NAME = re.compile(r"[\w.-]+\.safetensors")
FLOATS = (mx.float32, mx.float16, mx.bfloat16)
# Weights, packed or float; uint8 are mxfp scales, int64 BatchNorm's step counters.
STORED_DTYPES = {
    mx.float32: "F32",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint32: "U32",
    mx.int64: "I64",
    mx.uint8: "U8",
}
PIECE = 1 << 24  # values that are checked at a time while writing


class Fields:
    """One JSON object of a checkpoint, read field by field with type and range checks."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values = values
        self.where = where

    def error(self, key: str, problem: str) -> ConfigError:
        """The error for a field that cannot be used."""
        return ConfigError(f"{self.where}: {key}: {problem}; the checkpoint cannot be used")

    def get(self, key: str, default: Any = ...) -> Any:
        """The raw value; a field that is absent or null takes the default or is an error."""
        value = self.values.get(key)
        if value is None:
            if default is ...:
                raise self.error(key, "is missing")
            return default
        return value

    def has(self, key: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(key) is not None

    def object(self, key: str) -> "Fields":
        """A nested object."""
        value = self.get(key)
        if not isinstance(value, dict):
            raise self.error(key, "is not an object")
        return Fields(value, f"{self.where}: {key}")

    def check_version(self, known: int) -> None:
        """Refuse a canonical config that is newer than this program."""
        version = self.integer("format_version", 1, 1 << 20)
        if version > known:
            raise ConfigError(
                f"{self.where}: format_version {version} is newer than this program knows "
                f"({known}); update mlx-fastvlm, or convert the source again"
            )

    def _check(self, key: str, value: Any, kinds: Any, low: float, high: float) -> Any:
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
            scalar = isinstance(value, (int, float, str)) and len(repr(value)) < 40
            text = repr(value) if scalar else type(value).__name__
            kind = "an integer" if kinds is int else "a number"
            raise self.error(key, f"{text} is not {kind} from {low} to {high}")
        return value

    def integer(self, key: str, low: int, high: int, default: Any = ...) -> int:
        """An integer within [low, high]."""
        return int(self._check(key, self.get(key, default), int, low, high))

    def number(self, key: str, low: float, high: float, default: Any = ...) -> float:
        """A finite number within [low, high]."""
        return float(self._check(key, self.get(key, default), (int, float), low, high))

    def boolean(self, key: str, default: Any = ...) -> bool:
        """True or false, nothing else."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "is not true or false")
        return value

    def string(self, key: str, default: Any = ...) -> str:
        """A string of at most 4096 printable characters."""
        value = self.get(key, default)
        if not isinstance(value, str) or len(value) > 4096 or not value.isprintable():
            raise self.error(key, "is not a string of at most 4096 printable characters")
        return value

    def choice(self, key: str, allowed: tuple[str, ...], default: Any = ...) -> str:
        """One of the allowed strings."""
        value = self.string(key, default)
        if value not in allowed:
            raise self.error(key, f"{value[:40]!r} is not one of {', '.join(allowed)}")
        return value

    def _list(self, key: str, length: int | None, most: int) -> list[Any]:
        value = self.get(key)
        if not isinstance(value, (list, tuple)) or not value or len(value) > most:
            raise self.error(key, f"is not a list of 1 to {most} entries")
        if length is not None and len(value) != length:
            raise self.error(key, f"has {len(value)} entries instead of {length}")
        return list(value)

    def integers(
        self, key: str, low: int, high: int, length: int | None = None, most: int = 64
    ) -> tuple[int, ...]:
        """A list of integers, each within [low, high]."""
        values = self._list(key, length, most)
        return tuple(int(self._check(key, v, int, low, high)) for v in values)

    def numbers(
        self, key: str, low: float, high: float, length: int | None = None
    ) -> tuple[float, ...]:
        """A list of numbers, each within [low, high]."""
        values = self._list(key, length, 64)
        return tuple(float(self._check(key, v, (int, float), low, high)) for v in values)

    def choices(self, key: str, allowed: tuple[str, ...], length: int) -> tuple[str, ...]:
        """A list of strings, each one of the allowed."""
        values = self._list(key, length, 64)
        return tuple(Fields({key: v}, self.where).choice(key, allowed) for v in values)

    def booleans(self, key: str, length: int) -> tuple[bool, ...]:
        """A list of true and false."""
        values = self._list(key, length, 64)
        return tuple(Fields({key: v}, self.where).boolean(key) for v in values)


def read_bounded(path: Path, limit_bytes: int, remark: str = "") -> bytes:
    """Read a small file whole.

    Raises:
        ConfigError: it is no regular file, or larger than the limit, which `remark` explains.
        OSError: it is missing or cannot be read.
    """
    if path.exists() and not path.is_file():  # a pipe would block, a device never end
        raise ConfigError(f"{path}: is not a regular file")
    with path.open("rb") as file:
        data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise ConfigError(f"{path}: larger than {limit_bytes >> 20} MB{remark}")
    return data


def read_json(path: Path, limit_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Read a JSON object of bounded size.

    Raises:
        ConfigError: the file is missing, larger than the limit, not JSON, nested too deep, or
            repeats a key (two readers could then see two different files).
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key appears twice")
        return result

    try:
        data = read_bounded(path, limit_bytes, "; this is no config file")
        value = json.loads(data, object_pairs_hook=unique)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(f"{path}: not valid JSON ({reason}); download the file again") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds no JSON object")
    return value


def tensor_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those its index names, or all there are.

    Raises:
        CheckpointError: there are none, or the index names a file that is missing or outside.
    """
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = read_json(index, MAX_INDEX_BYTES).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise CheckpointError(f"{index}: has no weight_map; download the file again")
        for name in names.values():
            if not isinstance(name, str) or not SHARD_NAME.fullmatch(name):
                shown = repr(name[:80]) if isinstance(name, str) else type(name).__name__
                raise CheckpointError(f"{index}: {shown} is not the name of a shard beside it")
        files = sorted(set(names.values()))
        for name in files:
            if not (directory / name).is_file():
                raise CheckpointError(
                    f"{directory / name}: the index names this shard but it is not there; "
                    "download it again"
                )
        return [directory / name for name in files]
    # Hidden files are not weights: macOS leaves a "._model.safetensors" beside each unpacked file.
    names = sorted(
        p.name
        for p in directory.iterdir()
        if SHARD_NAME.fullmatch(p.name) and p.name[0] != "." and p.is_file()
    )
    if not names:
        raise CheckpointError(
            f"{directory}: holds no .safetensors file; give the directory of a checkpoint"
        )
    return [directory / name for name in names]


def _check_header(path: Path) -> None:
    """Reject what MLX's reader would take on trust; reads the header only."""
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: a header of {header_bytes} bytes; download it again")
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                part = file.get_slice(name)
                shape, dtype = part.get_shape(), part.get_dtype()
                if len(shape) > MAX_DIMENSIONS or any(n < 1 for n in shape):
                    raise CheckpointError(f"{path}: {name[:200]} has the shape {shape[:8]}")
                if dtype not in STORED_DTYPES.values():
                    known = ", ".join(sorted(STORED_DTYPES.values()))
                    raise CheckpointError(f"{path}: {name[:200]} is {dtype}, not one of {known}")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a sound safetensors file ({str(error)[:200]}); download it again"
        ) from error


def read_safetensors(path: Path) -> dict[str, mx.array]:
    """All tensors of one file by name, lazily: data is read when first used.

    Raises:
        CheckpointError: the file is damaged.
    """
    _check_header(path)
    loaded = mx.load(str(path), format="safetensors", stream=mx.cpu)
    assert isinstance(loaded, dict)
    return loaded


def read_tensors(directory: Path) -> dict[str, mx.array]:
    """All tensors of a checkpoint by name, lazily: data is read when first used.

    Raises:
        CheckpointError: a file is damaged, or two files hold the same tensor.
    """
    tensors: dict[str, mx.array] = {}
    for path in tensor_files(directory):
        loaded = read_safetensors(path)
        twice = sorted(tensors.keys() & loaded.keys())
        if twice:
            raise CheckpointError(f"{path}: also holds {name_some(twice)} of another shard")
        tensors.update(loaded)
    return tensors


def named_parameters(model: nn.Module) -> dict[str, mx.array]:
    """The model's parameters by their dotted names."""
    return dict(cast(list[tuple[str, mx.array]], tree_flatten(model.parameters())))


def is_finite(tensor: mx.array) -> mx.array:
    """Whether all values are, as a lazy scalar."""
    # The sum of all values is finite unless one of them is not; one pass, no temporary.
    return mx.isfinite(mx.sum(tensor.astype(mx.float32)))


def check_fit(model: nn.Module, tensors: dict[str, mx.array], where: str) -> None:
    """Compare names, shapes and kinds of lazy tensors with what a model takes.

    Raises:
        CheckpointError: names every tensor that is missing, left over or misshapen.
    """
    expected = named_parameters(model)
    problems = []
    if missing := sorted(expected.keys() - tensors.keys()):
        problems.append(f"missing {name_some(missing)}")
    if extra := sorted(tensors.keys() - expected.keys()):
        problems.append(f"no place for {name_some(extra)}")
    for name in sorted(expected.keys() & tensors.keys()):
        want, have = expected[name], tensors[name]
        packed = want.dtype not in FLOATS
        if want.shape != have.shape:
            problems.append(f"{name} has shape {have.shape} instead of {want.shape}")
        elif packed != (have.dtype not in FLOATS) or (packed and want.dtype != have.dtype):
            problems.append(f"{name} is {have.dtype} instead of {want.dtype}")
    if problems:
        raise CheckpointError(f"{where}: {name_some(problems)}; its tensors do not fit its config")


def as_dtype(tensor: mx.array, dtype: mx.Dtype) -> mx.array:
    """A float tensor in another precision; a packed one as it is."""
    if tensor.dtype not in FLOATS:
        return tensor
    # A lone number, such as logit_scale, costs nothing to keep exact.
    return tensor.astype(dtype if tensor.ndim else mx.float32)


def not_finite(names: list[str], dtype: mx.Dtype, where: str) -> CheckpointError:
    """The error for values that are not, or that do not fit the precision."""
    return CheckpointError(
        f"{where}: not finite in {str(dtype).split('.')[-1]}: {name_some(names)}; "
        "try --dtype float32, or download the checkpoint again"
    )


def assign(model: nn.Module, tensors: dict[str, mx.array], dtype: mx.Dtype, where: str) -> None:
    """Give the model its weights: names and shapes must match exactly, values must be finite.

    Float tensors are cast to `dtype`, packed ones are kept. The weights are evaluated here, so
    that another thread can use the model. `tensors` is emptied on the way, so that a source
    tensor's memory is free as soon as its cast is done.

    Raises:
        CheckpointError: names every tensor that is missing, left over, misshapen or not finite.
    """
    check_fit(model, tensors, where)
    weights = [(name, as_dtype(_in_order(tensors.pop(name)), dtype)) for name in list(tensors)]
    model.load_weights(weights, strict=True)
    finite = {name: is_finite(value) for name, value in weights if value.dtype in FLOATS}
    try:
        mx.eval(model.parameters(), finite)
    except RuntimeError as error:
        raise CheckpointError(f"{where}: the weights cannot be read ({error})") from error
    if bad := sorted(name for name, ok in finite.items() if not ok.item()):
        raise not_finite(bad, dtype, where)


def _in_order(tensor: mx.array) -> mx.array:
    """The same, row by row in memory, with the strides that go with it.

    PyTorch's depthwise kernels (C, 1, k, k) lie so too with the second axis put last, but that
    axis keeps a stride of k * k, and with it cuDNN chooses a convolution that takes 5 to 17 times
    as long (H200, MLX 0.32.4, 2026-11-26).
    """
    return tensor.reshape(-1).reshape(tensor.shape)


def _shards(tensors: dict[str, mx.array], limit_bytes: int) -> list[list[str]]:
    """Cut the sorted names into groups of at most `limit_bytes` (or one tensor)."""
    groups: list[list[str]] = [[]]
    size = 0
    for name in sorted(tensors):
        if groups[-1] and size + tensors[name].nbytes > limit_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensors[name].nbytes
    return groups


def write_tensors(
    directory: Path, tensors: dict[str, mx.array], shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write model.safetensors, or numbered shards with an index.

    Lazy tensors are evaluated, written and forgotten one after the other, so that memory is
    needed for the largest and not for all; `tensors` is emptied on the way.

    Raises:
        CheckpointError: a value is not finite.
    """
    total_bytes = sum(tensor.nbytes for tensor in tensors.values())
    groups = _shards(tensors, shard_bytes)
    weight_map = {}
    for i, names in enumerate(groups):
        last = f"-{i + 1:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
        file = f"model{last}.safetensors"
        with (directory / file).open("wb") as shard:
            shard.write(_header({name: tensors[name] for name in names}))
            for name in names:
                shard.write(_data(tensors.pop(name), name))
        weight_map.update(dict.fromkeys(names, file))
    if len(groups) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        path = directory / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2))


def _header(tensors: dict[str, mx.array]) -> bytes:
    """Length and JSON that begin a safetensors file, padded to 8 bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.nbytes
        entries[name] = {
            "dtype": STORED_DTYPES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (start, end),
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _data(tensor: mx.array, name: str) -> memoryview:
    """A tensor's bytes, little-endian; evaluated here."""
    mx.eval(tensor)
    if tensor.dtype in FLOATS:
        flat = tensor.reshape(-1)
        pieces = (flat[i : i + PIECE] for i in range(0, flat.size, PIECE))
        if not all(is_finite(piece).item() for piece in pieces):
            raise not_finite([name], tensor.dtype, "the weights")
    if tensor.dtype == mx.bfloat16:  # which NumPy has not
        tensor = tensor.view(mx.uint16)
    data: NDArray[Any] = np.ascontiguousarray(np.asarray(tensor)).reshape(-1)
    return data.view(np.uint8).data
