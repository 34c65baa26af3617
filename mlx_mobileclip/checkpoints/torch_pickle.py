"""Read PyTorch's .pt and .bin files as hostile input, without PyTorch and without pickle.

Such a file is a zip of raw storages and one pickle that says how to view them as tensors. A
pickle is a program; this module interprets the few instructions that a dictionary of tensors
takes and refuses every other one by name. Nothing of what it names is ever imported or called:
the four names on the list below are labels that are recognised here.

File format: torch 2.13 `torch/serialization.py` (zip files, written since 1.6). Instructions:
`pickletools` of the standard library, which also parses them.
"""

import io
import itertools
import math
import pickletools
import re
import struct
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError, name_some

MAX_PICKLE_BYTES = 16 << 20
MAX_STEPS = 500_000  # of the pickle; the largest MobileCLIP takes some 100,000
MAX_ENTRIES = 100_000
MAX_DIMENSIONS = 8
MAX_COUNT = 1 << 40
MAX_REPEATS = 2  # how often the file's bytes may appear in tensors: tied weights, not floods
PLAIN_NAME = re.compile(r"[\w.\-+= ]+(/[\w.\-+= ]+)*")

# Storage class: (item type as numpy reads it, type it is in MLX).
STORAGES: dict[str, tuple[str, mx.Dtype]] = {
    "torch FloatStorage": ("<f4", mx.float32),
    "torch HalfStorage": ("<f2", mx.float16),
    "torch BFloat16Storage": ("<u2", mx.bfloat16),
    "torch LongStorage": ("<i8", mx.int64),
    "torch IntStorage": ("<i4", mx.int32),
    "torch ByteStorage": ("u1", mx.uint8),
    "torch BoolStorage": ("?", mx.bool_),
}
ORDERED_DICT = "collections OrderedDict"
REBUILD_TENSOR = "torch._utils _rebuild_tensor_v2"
REBUILD_PARAMETER = "torch._utils _rebuild_parameter"
GLOBALS = {ORDERED_DICT, REBUILD_TENSOR, REBUILD_PARAMETER, *STORAGES}


@dataclass(frozen=True, slots=True, eq=False)
class Global:
    """One of the names on the list; it stands on the stack in place of what it names."""

    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """A named run of items in the file."""

    kind: str
    key: str
    items: int


@dataclass(frozen=True, slots=True, eq=False)
class TensorView:
    """How a tensor lies in its storage; counts are in items."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_torch(path: Path) -> dict[str, mx.array]:
    """All tensors of a checkpoint file by name, without the containers around them.

    Args:
        path: A .pt or .bin file as `torch.save` writes it. The tensors may stand under
            "state_dict", "model" or "model_state_dict"; what stands beside that is not read.

    Raises:
        CheckpointError: the file is damaged, holds anything but tensors and plain values, or is
            of the kind that PyTorch wrote before 1.6.
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
            tensors = _tensors_of(_Machine(data, where).run(), where)
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
    total = 0
    for entry in entries:
        name = entry.filename
        if not PLAIN_NAME.fullmatch(name) or ".." in name.split("/"):
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
    if f"{root}constants.pkl" in names:
        raise CheckpointError(
            f"{where}: is a TorchScript program; give the checkpoint it was made from"
        )
    if archive.getinfo(f"{root}data.pkl").file_size > MAX_PICKLE_BYTES:
        raise CheckpointError(f"{where}: data.pkl is larger than {MAX_PICKLE_BYTES >> 20} MB")
    order = f"{root}byteorder"
    if order in names and archive.getinfo(order).file_size < 16:
        text = archive.read(order)
        if text.strip() != b"little":
            raise CheckpointError(f"{where}: its byte order is {text!r}; only little is read")
    return root


class _Machine:
    """A pickle interpreter that can build tensors' descriptions and plain values, no more."""

    def __init__(self, data: bytes, where: str):
        self.data = data
        self.where = where
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {problem}; the file is not read")

    def run(self) -> Any:
        """Interpret to the end; returns the object that is left."""
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # about escapes in names, which have none
            return self._run()

    def _run(self) -> Any:
        steps = pickletools.genops(io.BytesIO(self.data))
        try:
            for opcode, argument, _ in itertools.islice(steps, MAX_STEPS):
                if opcode.name == "STOP":
                    return self.pop()
                step = _STEPS.get(opcode.name)
                if step is not None:
                    step(self, argument)
                elif opcode.name in _CONSTANTS:
                    self.stack.append(_CONSTANTS[opcode.name])
                elif opcode.name in _LITERALS:
                    self.stack.append(argument)
                else:
                    raise self.error(f"its pickle uses the instruction {opcode.name}")
        except (ValueError, KeyError, IndexError, TypeError, DeprecationWarning) as error:
            raise self.error(f"its pickle is damaged ({str(error)[:120]})") from error
        raise self.error(f"its pickle has no end within {MAX_STEPS} steps")

    def pop(self) -> Any:
        if not self.stack or (self.marks and len(self.stack) <= self.marks[-1]):
            raise ValueError("nothing on the stack")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def top(self, kind: type) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kind):
            raise ValueError(f"no {kind.__name__} where one is needed")
        return self.stack[-1]

    # The instructions. Each takes the machine and its argument from the file.

    def find_global(self, name: str) -> None:
        if name not in GLOBALS:
            raise self.error(f"its pickle asks for {name.replace(' ', '.')[:100]}")
        self.stack.append(Global(name))

    def stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        self.find_global(f"{module} {name}")

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def mark(self, _: Any) -> None:
        self.marks.append(len(self.stack))

    def tuple_of(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(items)))

    def append(self, items: list[Any]) -> None:
        self.top(list).extend(items)

    def set_items(self, items: list[Any]) -> None:
        if len(items) % 2:
            raise ValueError("a key without a value")
        target = self.top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Other keys could hide work in their hash.
            if not isinstance(key, (str, int)):
                raise ValueError(f"a {type(key).__name__} as a key")
            target[key] = value

    def build(self, _: Any) -> None:
        # PyTorch hangs the modules' versions on the dictionary of tensors; they do not matter.
        state = self.pop()
        if not isinstance(state, dict):
            raise self.error("its pickle sets the state of an object")
        self.top(dict)

    def reduce(self, _: Any) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise ValueError("a call of something that is no function")
        if function.name == ORDERED_DICT and not arguments:
            self.stack.append({})
        elif function.name == REBUILD_TENSOR and 6 <= len(arguments) <= 7:
            self.stack.append(self._tensor(*arguments[:4]))
        elif function.name == REBUILD_PARAMETER and len(arguments) == 3:
            if not isinstance(arguments[0], TensorView):
                raise ValueError("a parameter that is no tensor")
            self.stack.append(arguments[0])
        else:
            raise self.error(f"its pickle calls {function.name.replace(' ', '.')} oddly")

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any) -> TensorView:
        numbers = [offset, *shape, *strides]
        if not isinstance(storage, Storage) or any(type(n) is not int for n in numbers):
            raise ValueError("a tensor with an odd place, shape or stride")
        if not all(0 <= n < MAX_COUNT for n in numbers) or 0 in shape:
            raise ValueError("a tensor with a size or stride out of range")
        if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
            raise ValueError(f"a tensor with {len(shape)} sizes and {len(strides)} strides")
        count = math.prod(shape)
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if count > storage.items or last >= storage.items:
            raise ValueError("a tensor that reaches beyond its storage")
        return TensorView(storage, offset, tuple(shape), tuple(strides))

    def persistent_id(self, _: Any) -> None:
        found = self.pop()
        match found:
            case ("storage", Global(name=kind), str(key), str(), int(items)) if kind in STORAGES:
                if not re.fullmatch(r"[0-9]{1,9}", key):
                    raise self.error(f"a storage is called {key[:40]!r}")
                if items < 0:
                    raise ValueError("a storage of negative size")
                self.stack.append(Storage(kind, key, items))
            case _:
                raise ValueError("a reference to something that is no storage")


_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda m, a: None,
    "FRAME": lambda m, a: None,
    "GLOBAL": _Machine.find_global,
    "STACK_GLOBAL": _Machine.stack_global,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "MARK": _Machine.mark,
    "EMPTY_DICT": lambda m, a: m.stack.append({}),
    "EMPTY_LIST": lambda m, a: m.stack.append([]),
    "EMPTY_TUPLE": lambda m, a: m.stack.append(()),
    "TUPLE": lambda m, a: m.stack.append(tuple(m.pop_to_mark())),
    "TUPLE1": lambda m, a: m.tuple_of(1),
    "TUPLE2": lambda m, a: m.tuple_of(2),
    "TUPLE3": lambda m, a: m.tuple_of(3),
    "APPEND": lambda m, a: m.append([m.pop()]),
    "APPENDS": lambda m, a: m.append(m.pop_to_mark()),
    "SETITEM": lambda m, a: m.set_items([m.pop(), m.pop()][::-1]),
    "SETITEMS": lambda m, a: m.set_items(m.pop_to_mark()),
    "BUILD": _Machine.build,
    "REDUCE": _Machine.reduce,
    "BINPERSID": _Machine.persistent_id,
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE"),
}


def _tensors_of(found: Any, where: str) -> dict[str, TensorView]:
    """The dictionary of tensors inside the usual wrappers."""
    for wrapper in ("state_dict", "model", "model_state_dict"):
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    if not isinstance(found, dict):
        raise CheckpointError(f"{where}: holds a {type(found).__name__}, no dictionary of tensors")
    tensors = {k: v for k, v in found.items() if isinstance(k, str) and isinstance(v, TensorView)}
    if not tensors:
        keys = [str(key)[:40] for key in found]
        raise CheckpointError(f"{where}: holds no tensors, only {name_some(keys) or 'nothing'}")
    return tensors


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
    items = np.frombuffer(data, kind, view.storage.items)[view.offset :]
    strides = [stride * items.itemsize for stride in view.strides]
    array = np.lib.stride_tricks.as_strided(items, view.shape, strides, writeable=False)
    result = mx.array(np.ascontiguousarray(array).reshape(view.shape))
    return result.view(mx.bfloat16) if dtype == mx.bfloat16 else result
