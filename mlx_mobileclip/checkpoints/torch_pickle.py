"""Read PyTorch's .pt, .pth, .ckpt and .bin files as hostile input, without PyTorch and pickle.

Such a file is a zip of raw storages and one pickle that describes the tensors in them. The pickle
is interpreted by `pickle_machine`, which never imports or calls what it names; this module checks
the zip, finds the dictionary of tensors and reads their storages.

File format: torch 2.13 `torch/serialization.py` (zip files, written since 1.6).
"""

import io
import math
import re
import struct
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError, name_some, refuse_lfs_pointer
from .pickle_machine import STORAGES, Opaque, TensorView, interpret

MAX_PICKLE_BYTES = 16 << 20
MAX_DIRECTORY_BYTES = 4 << 20  # of the zip; ten times what PyTorch writes
MAX_REPEATS = 2  # total size of tensors / size of the file; more than 1 for tied weights
MAX_SPREAD = 4  # span of a large tensor in its storage / its size
SMALL_BYTES = 1 << 20
# Keys under which checkpoints have their tensors, in order of preference. As in open_clip, the
# weights are preferred to their average over training.
WRAPPERS = (
    *("state_dict", "model_state_dict", "model", "module", "net", "network", "student"),
    *("state_dict_ema", "model_ema", "ema", "weights", "params"),
)
# Prefixes of keys under which trainers store their own state.
TRAINER_STATE = ("optim", "callback", "loop", "scheduler", "lr_", "scaler", "rng")
MAX_WRAPPERS = 4  # levels of nesting

Check = Callable[[dict[str, mx.array]], object]


def read_torch(
    path: Path, check: Check | None = None, unused: str | None = None
) -> dict[str, mx.array]:
    """Read the tensors of a checkpoint file by name, without the containers around them.

    Args:
        path: A file written by `torch.save`. The tensors may be in a dictionary under one of
            `WRAPPERS`, or in the only one there is; anything beside it is not read.
        check: Called before any tensor is read, with lazy zeros in their place; raises if their
            names, shapes or types are not those of the model.
        unused: Pattern of the names of tensors to skip.

    Raises:
        CheckpointError: the file is damaged, has anything but tensors and plain values among its
            tensors, or is in the format from before PyTorch 1.6.
    """
    try:
        with path.open("rb") as file:
            return read_torch_stream(file, str(path), check, unused)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error


def read_torch_stream(
    file: IO[bytes], where: str, check: Check | None = None, unused: str | None = None
) -> dict[str, mx.array]:
    """`read_torch` for an open file; `where` is its name in messages."""
    try:
        size_bytes = file.seek(0, io.SEEK_END)
        file.seek(0)
        start = file.read(64)
        refuse_lfs_pointer(start, where)
        if not start.startswith(b"PK"):
            raise CheckpointError(_not_a_zip(where, start))
        bounded = _BoundedFile(file, where)
        with zipfile.ZipFile(cast(IO[bytes], bounded)) as archive:
            bounded.limit = size_bytes
            root = _check_archive(archive, size_bytes, where)
            data = archive.read(f"{root}data.pkl")
            tensors = _find_tensors(interpret(data, where), where)
            if unused is not None:
                tensors = {k: v for k, v in tensors.items() if not re.search(unused, k)}
            _check_sizes(archive, root, tensors, size_bytes, where)
            if check is not None:
                check(
                    {k: mx.zeros(v.shape, STORAGES[v.storage.kind][1]) for k, v in tensors.items()}
                )
            return _load(archive, root, tensors)
    except (OSError, zipfile.BadZipFile, EOFError, ValueError, RuntimeError, struct.error) as error:
        raise CheckpointError(
            f"{where}: not a valid PyTorch file ({str(error)[:200]}); download it again"
        ) from error


class _BoundedFile:
    """A file that limits the size of a read, as `zipfile` reads the whole directory at once."""

    def __init__(self, file: IO[bytes], where: str):
        self.limit = MAX_DIRECTORY_BYTES
        self._file = file
        self._where = where

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(self.limit + 1 if size < 0 else min(size, self.limit + 1))
        if len(data) > self.limit:
            limit = f"{self.limit >> 20} MB"
            raise CheckpointError(f"{self._where}: its directory of entries is larger than {limit}")
        return data


def _not_a_zip(where: str, start: bytes) -> str:
    if start.startswith(b"\x80"):
        return (
            f"{where}: is in the format from before PyTorch 1.6, which cannot be read safely; "
            "save it again with a newer PyTorch, or as safetensors"
        )
    return f"{where}: is not a PyTorch file (not a zip); download it again"


def _check_archive(archive: zipfile.ZipFile, size_bytes: int, where: str) -> str:
    """Check the entries of the zip before reading any; returns the folder of data.pkl."""
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if len(set(names)) != len(names):
        raise CheckpointError(f"{where}: two of its entries have the same name")
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise CheckpointError(
            f"{where}: is a TorchScript program; give the checkpoint it was made from"
        )
    total = 0
    for entry in entries:
        name = entry.filename
        # PyTorch prefixes every entry with the name of the file: "weights (1)/data.pkl".
        if "\\" in name or {"", ".."} & set(name.split("/")):
            raise CheckpointError(f"{where}: {name[:80]!r} is not a plain name for an entry")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise CheckpointError(
                f"{where}: {name[:80]} is compressed, which PyTorch never does; download it again"
            )
        total += entry.file_size
    if total > size_bytes:
        raise CheckpointError(f"{where}: its entries claim {total} bytes of a {size_bytes} file")
    roots = [name[: -len("data.pkl")] for name in names if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise CheckpointError(f"{where}: has {len(roots)} entries data.pkl instead of one")
    root = roots[0]
    if archive.getinfo(f"{root}data.pkl").file_size > MAX_PICKLE_BYTES:
        raise CheckpointError(f"{where}: data.pkl is larger than {MAX_PICKLE_BYTES >> 20} MB")
    order = f"{root}byteorder"
    if order in names and archive.getinfo(order).file_size < 16:
        text = archive.read(order)
        if text.strip() != b"little":
            raise CheckpointError(
                f"{where}: its byte order is {text!r}; only little-endian is supported"
            )
    return root


def _find_tensors(found: Any, where: str) -> dict[str, TensorView]:
    """Find the dictionary of tensors: under one of `WRAPPERS`, or the only one there is."""
    for _ in range(MAX_WRAPPERS):
        if not isinstance(found, dict):
            break
        seen: set[int] = set()  # dictionaries without tensors are searched only once
        inner = (found.get(name) for name in WRAPPERS)
        wrapped = next((each for each in inner if any(_with_tensors(each, seen))), None)
        if wrapped is None:
            break
        found = wrapped
    if not isinstance(found, dict):
        what = found if isinstance(found, Opaque) else type(found).__name__
        raise CheckpointError(
            f"{where}: holds a {what}, not a dictionary of tensors; save the model's state_dict()"
        )
    holding = list(_with_tensors(found, set()))
    models = [
        (path, each) for path, each in holding if any("." in name for name in _tensors_in(each))
    ]
    if len(models) == 1:
        found = models[0][1]
    elif not _tensors_in(found) and len(holding) == 1:
        found = holding[0][1]
    elif not _tensors_in(found) and holding:
        raise CheckpointError(
            f"{where}: holds {len(holding)} dictionaries of tensors "
            f"({name_some([path for path, _ in holding])}); save only the one to load"
        )
    tensors = _tensors_in(found)
    if not tensors:
        keys = [
            f"{str(key)[:40]} ({value})" if isinstance(value, Opaque) else str(key)[:40]
            for key, value in found.items()
        ]
        raise CheckpointError(f"{where}: holds no tensors, only {name_some(keys) or 'nothing'}")
    for key, value in found.items():
        if isinstance(value, Opaque):
            raise CheckpointError(
                f"{where}: {str(key)[:200]}, among its tensors, is a {value}, which is not "
                "read; save the model's state_dict() alone"
            )
    return tensors


def _tensors_in(found: dict[Any, Any]) -> dict[str, TensorView]:
    return {k: v for k, v in found.items() if isinstance(k, str) and isinstance(v, TensorView)}


def _with_tensors(found: Any, seen: set[int]) -> Iterator[tuple[str, dict[Any, Any]]]:
    """The dictionaries that hold tensors, this one or nested ones, with their paths.

    TRAINER_STATE is skipped, and so are dictionaries whose id is in `seen`.
    """
    waiting = [("", found)]
    while waiting:
        path, value = waiting.pop()
        if not isinstance(value, dict) or id(value) in seen:
            continue
        seen.add(id(value))
        if _tensors_in(value):
            yield path, value
        for key, inner in value.items():
            shown = str(key)[:40]
            if isinstance(inner, dict) and not shown.lower().startswith(TRAINER_STATE):
                waiting.append((f"{path}.{shown}".lstrip(".")[:80], inner))


def _span(view: TensorView) -> tuple[int, int]:
    """Byte range of a tensor in its storage: start, and end (exclusive)."""
    if 0 in view.shape:
        return 0, 0
    size = np.dtype(STORAGES[view.storage.kind][0]).itemsize
    last = view.offset + sum((n - 1) * s for n, s in zip(view.shape, view.strides, strict=True))
    return view.offset * size, (last + 1) * size


def _check_sizes(
    archive: zipfile.ZipFile,
    root: str,
    tensors: dict[str, TensorView],
    size_bytes: int,
    where: str,
) -> None:
    """Check the sizes of the tensors against those in the file, before any is read."""
    stored = {entry.filename: entry.file_size for entry in archive.infolist()}
    total = 0
    for name, view in tensors.items():
        entry, shown = f"{root}data/{view.storage.key}", name[:200]
        item_bytes = np.dtype(STORAGES[view.storage.kind][0]).itemsize
        if entry not in stored:
            raise CheckpointError(f"{where}: {entry}, the storage of {shown}, is missing")
        needed = view.storage.items * item_bytes
        if needed > stored[entry]:
            raise CheckpointError(
                f"{where}: {entry} has {stored[entry]} bytes, but {shown} needs {needed}"
            )
        own, (start, end) = math.prod(view.shape) * item_bytes, _span(view)
        if end - start > max(MAX_SPREAD * own, SMALL_BYTES):
            raise CheckpointError(
                f"{where}: {shown} has {own} bytes, scattered over {end - start}; save a copy of it"
            )
        total += own
    if total > MAX_REPEATS * size_bytes:
        raise CheckpointError(f"{where}: its tensors claim {total} bytes of a {size_bytes} file")


def _load(
    archive: zipfile.ZipFile, root: str, tensors: dict[str, TensorView]
) -> dict[str, mx.array]:
    """Read the parts of each storage that its tensors use, once and in order."""
    by_storage: dict[str, list[str]] = defaultdict(list)
    for name, view in tensors.items():
        by_storage[view.storage.key].append(name)
    result: dict[str, mx.array] = {}
    for key, members in by_storage.items():
        with archive.open(f"{root}data/{key}") as file:
            block, start, end = b"", 0, 0  # the last bytes read, and their range
            for name in sorted(members, key=lambda name: _span(tensors[name])):
                first, last = _span(tensors[name])
                if first > end:
                    file.seek(first)
                    block, start, end = b"", first, first
                if last > end:
                    block = block[first - start :] + file.read(last - end)
                    start, end = first, last
                result[name] = _array(block[first - start : last - start], tensors[name])
    return {name: result[name] for name in tensors}


def _array(data: bytes, view: TensorView) -> mx.array:
    """Convert the bytes of a tensor's span to an array."""
    kind, dtype = STORAGES[view.storage.kind]
    if 0 in view.shape:
        return mx.zeros(view.shape, dtype)
    items = np.frombuffer(data, kind)
    strides = [stride * items.itemsize for stride in view.strides]
    array = np.lib.stride_tricks.as_strided(items, view.shape, strides, writeable=False)
    array = np.ascontiguousarray(array).reshape(view.shape)
    result = mx.array(array.astype(np.float32) if array.dtype == np.float64 else array)
    return result.view(mx.bfloat16) if dtype == mx.bfloat16 else result
