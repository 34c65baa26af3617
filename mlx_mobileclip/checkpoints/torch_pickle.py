"""Read PyTorch's .pt, .pth, .ckpt and .bin files as hostile input, without PyTorch and pickle.

Such a file is a zip of raw storages and one pickle that says how to view them as tensors. The
pickle is interpreted by `pickle_machine`, which imports and calls nothing that it names; this
module checks the zip, finds the dictionary of tensors and reads their storages.

File format: torch 2.13 `torch/serialization.py` (zip files, written since 1.6).
"""

import io
import math
import struct
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import IO, Any

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError, name_some
from .pickle_machine import STORAGES, Opaque, TensorView, interpret

MAX_PICKLE_BYTES = 16 << 20
MAX_ENTRIES = 100_000
MAX_REPEATS = 2  # how often the file's bytes may appear in tensors: tied weights, not floods
# Where checkpoints keep their tensors, the more usual first. Weights averaged over training come
# after those themselves, as open_clip takes them.
WRAPPERS = (
    *("state_dict", "model_state_dict", "model", "module", "net", "network", "student"),
    *("state_dict_ema", "model_ema", "ema", "weights", "params"),
)
TRAINERS = ("optim", "callback", "loop", "scheduler", "lr_", "scaler", "rng")
MAX_WRAPPERS = 8  # inside each other


def read_torch(path: Path) -> dict[str, mx.array]:
    """All tensors of a checkpoint file by name, without the containers around them.

    Args:
        path: A file as `torch.save` writes it. The tensors may stand under one of `WRAPPERS`, or
            be the only ones there are; what stands beside them is not read.

    Raises:
        CheckpointError: the file is damaged, holds anything but tensors and plain values among
            its tensors, or is of the kind that PyTorch wrote before 1.6.
    """
    try:
        with path.open("rb") as file:
            return read_torch_stream(file, str(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error


def read_torch_stream(file: IO[bytes], where: str) -> dict[str, mx.array]:
    """`read_torch` for an open file; `where` is what messages call it."""
    try:
        size_bytes = file.seek(0, io.SEEK_END)
        file.seek(0)
        start = file.read(4)
        if not start.startswith(b"PK"):
            raise CheckpointError(_not_a_zip(where, start))
        with zipfile.ZipFile(file) as archive:
            root = _check_archive(archive, size_bytes, where)
            data = archive.read(f"{root}data.pkl")
            tensors = _tensors_of(interpret(data, where), where)
            return _load(archive, root, tensors, size_bytes, where)
    except (OSError, zipfile.BadZipFile, EOFError, ValueError, RuntimeError, struct.error) as error:
        raise CheckpointError(
            f"{where}: not a sound PyTorch file ({str(error)[:200]}); download it again"
        ) from error


def _not_a_zip(where: str, start: bytes) -> str:
    if start.startswith(b"\x80"):
        return (
            f"{where}: is in the format from before PyTorch 1.6, which cannot be read safely; "
            "save it again with a newer PyTorch, or as safetensors"
        )
    return f"{where}: is no PyTorch file (it is no zip); download it again"


def _check_archive(archive: zipfile.ZipFile, size_bytes: int, where: str) -> str:
    """Check what the zip claims before any of it is read; returns the folder of data.pkl."""
    entries = archive.infolist()
    if len(entries) > MAX_ENTRIES:
        raise CheckpointError(f"{where}: has {len(entries)} entries, more than {MAX_ENTRIES}")
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
                f"{where}: {name[:80]} is compressed, which PyTorch never does; not read"
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
            raise CheckpointError(f"{where}: its byte order is {text!r}; only little is read")
    return root


def _tensors_of(found: Any, where: str) -> dict[str, TensorView]:
    """The dictionary of tensors: under the usual names, or the only one there is."""
    for _ in range(MAX_WRAPPERS):
        if isinstance(found, dict):
            inner = (found.get(name) for name in WRAPPERS)
            found = next((each for each in inner if _holding(each)), found)
    if not isinstance(found, dict):
        what = found if isinstance(found, Opaque) else type(found).__name__
        raise CheckpointError(
            f"{where}: holds a {what}, no dictionary of tensors; save the model's state_dict()"
        )
    holding = _holding(found)
    models = [(path, each) for path, each in holding if any("." in name for name in _own(each))]
    if len(models) == 1:
        found = models[0][1]
    elif not _own(found) and len(holding) == 1:
        found = holding[0][1]
    elif not _own(found) and holding:
        raise CheckpointError(
            f"{where}: holds {len(holding)} dictionaries of tensors "
            f"({name_some([path for path, _ in holding])}); save the one to load by itself"
        )
    tensors = _own(found)
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
                "read; save the model's tensors by themselves"
            )
    return tensors


def _own(found: dict[Any, Any]) -> dict[str, TensorView]:
    return {k: v for k, v in found.items() if isinstance(k, str) and isinstance(v, TensorView)}


def _holding(found: Any) -> list[tuple[str, dict[Any, Any]]]:
    """This dictionary and those within it that hold tensors, with their places.

    What trainers keep for themselves is passed over.
    """
    result: list[tuple[str, dict[Any, Any]]] = []
    seen: set[int] = set()
    waiting = [("", found)]
    while waiting:
        path, value = waiting.pop()
        if not isinstance(value, dict) or id(value) in seen:
            continue
        seen.add(id(value))
        if _own(value):
            result.append((path, value))
        for key, inner in value.items():
            shown = str(key)[:40]
            if isinstance(inner, dict) and not shown.lower().startswith(TRAINERS):
                waiting.append((f"{path}.{shown}".lstrip(".")[:80], inner))
    return result


def _load(
    archive: zipfile.ZipFile,
    root: str,
    tensors: dict[str, TensorView],
    size_bytes: int,
    where: str,
) -> dict[str, mx.array]:
    """Read each storage once and cut its tensors out."""
    by_storage: dict[str, list[str]] = defaultdict(list)
    total = 0
    for name, view in tensors.items():
        by_storage[view.storage.key].append(name)
        total += math.prod(view.shape) * np.dtype(STORAGES[view.storage.kind][0]).itemsize
    if total > MAX_REPEATS * size_bytes:
        raise CheckpointError(f"{where}: its tensors claim {total} bytes of a {size_bytes} file")
    names = set(archive.namelist())
    result: dict[str, mx.array] = {}
    for key, members in by_storage.items():
        entry = f"{root}data/{key}"
        if entry not in names:
            raise CheckpointError(
                f"{where}: {entry}, the storage of {members[0][:200]}, is missing"
            )
        for name in members:
            storage = tensors[name].storage
            needed = storage.items * np.dtype(STORAGES[storage.kind][0]).itemsize
            stored = archive.getinfo(entry).file_size
            if needed > stored:
                raise CheckpointError(
                    f"{where}: {entry} has {stored} bytes, but {name[:200]} needs {needed}"
                )
        data = archive.read(entry)
        for name in members:
            result[name] = _array(data, tensors[name])
    return {name: result[name] for name in tensors}


def _array(data: bytes, view: TensorView) -> mx.array:
    kind, dtype = STORAGES[view.storage.kind]
    if 0 in view.shape:
        return mx.zeros(view.shape, dtype)
    items = np.frombuffer(data, kind, view.storage.items)[view.offset :]
    strides = [stride * items.itemsize for stride in view.strides]
    array = np.lib.stride_tricks.as_strided(items, view.shape, strides, writeable=False)
    array = np.ascontiguousarray(array).reshape(view.shape)
    result = mx.array(array.astype(np.float32) if array.dtype == np.float64 else array)
    return result.view(mx.bfloat16) if dtype == mx.bfloat16 else result
