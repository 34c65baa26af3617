"""Interpret the pickle of a PyTorch file as hostile input, without pickle.

A pickle is a program. This module interprets the instructions that checkpoints use and refuses all
others by name. Nothing that a pickle names is ever imported or called: the few names in `GLOBALS`
are only compared, and every other name, or object made from it, becomes an `Opaque`, which has a
name and nothing else.

Instructions: `pickletools` of the standard library, which also parses them.
"""

import io
import pickletools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..errors import CheckpointError

MAX_STEPS = 500_000  # instructions; the largest MobileCLIP has some 100,000
MAX_DIMENSIONS = 8
MAX_COUNT = (1 << 31) - 1  # size of an axis of an MLX array
OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}
MAX_NAME = 1000  # characters

# Storage class: (NumPy type of the items, MLX type of the array).
STORAGES: dict[str, tuple[str, mx.Dtype]] = {
    "torch DoubleStorage": ("<f8", mx.float32),
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
REBUILD_PARAMETER_WITH_STATE = "torch._utils _rebuild_parameter_with_state"
PARAMETERS = {REBUILD_PARAMETER: 3, REBUILD_PARAMETER_WITH_STATE: 4}  # number of arguments
GLOBALS = {ORDERED_DICT, REBUILD_TENSOR, *PARAMETERS, *STORAGES}


@dataclass(frozen=True, slots=True, eq=False)
class Global:
    """One of the names in `GLOBALS`, in place of the object that it names."""

    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Opaque:
    """A placeholder for any other global, and for objects made from it."""

    name: str

    def __str__(self) -> str:
        return self.name[:100].replace(" ", ".")


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """A named run of items in the file."""

    kind: str
    key: str
    items: int


@dataclass(frozen=True, slots=True, eq=False)
class TensorView:
    """Layout of a tensor in its storage; offset and strides are in items."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def interpret(data: bytes, where: str) -> Any:
    """Build the object of a pickle from plain values, `TensorView`s, and `Opaque`s for all else.

    Raises:
        CheckpointError: it is damaged, endless, or uses an unknown instruction.
    """
    return _Machine(data, where).run()


class _Machine:
    """A pickle interpreter that can only build descriptions of tensors and plain values."""

    def __init__(self, data: bytes, where: str):
        self.data = data
        self.where = where
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {problem}; the file is not read")

    def run(self) -> Any:
        """Interpret the pickle and return its object."""
        try:
            for opcode, argument in self.instructions():
                if opcode == "STOP":
                    return self.pop()
                step = _STEPS.get(opcode)
                if step is not None:
                    step(self, argument)
                elif opcode in _CONSTANTS:
                    self.stack.append(_CONSTANTS[opcode])
                else:
                    self.stack.append(argument)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise self.error(f"its pickle is damaged ({str(error)[:120]})") from error
        raise self.error(f"its pickle has no end within {MAX_STEPS} steps")

    def instructions(self) -> Iterator[tuple[str, Any]]:
        """Names of the instructions, with their arguments."""
        file = io.BytesIO(self.data)
        for _ in range(MAX_STEPS):
            opcode = OPCODES.get(file.read(1).decode("latin-1"))
            if opcode is None:
                raise ValueError("an invalid instruction")
            if opcode.name not in _KNOWN:
                raise self.error(f"its pickle uses the instruction {opcode.name}")
            if opcode.name == "GLOBAL":  # pickletools warns about a backslash in it
                lines = [file.readline(MAX_NAME).decode("ascii") for _ in ("module", "name")]
                if not all(line.endswith("\n") and "\\" not in line for line in lines):
                    raise ValueError("a name that is too long or has a backslash")
                yield opcode.name, " ".join(line[:-1] for line in lines)
            else:
                yield opcode.name, opcode.arg.reader(file) if opcode.arg else None

    def pop(self) -> Any:
        if not self.stack or (self.marks and len(self.stack) <= self.marks[-1]):
            raise ValueError("an empty stack")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def drop(self, _: Any) -> None:
        """Discard the top of the stack; needed, as is `drop_to_mark`, for recursive tuples."""
        self.pop()

    def drop_to_mark(self, _: Any) -> None:
        self.pop_to_mark()

    def top(self, kind: type) -> Any:
        """The top of the stack, which must be of this type."""
        if not self.stack or not isinstance(self.stack[-1], kind):
            raise ValueError(f"an instruction that needs a {kind.__name__}")
        return self.stack[-1]

    def on_opaque(self) -> bool:
        """Whether the top of the stack is opaque; operations on it have no effect."""
        return bool(self.stack) and isinstance(self.stack[-1], Opaque)

    # The instructions. Each takes the machine and its argument from the file.

    def find_global(self, name: str) -> None:
        self.stack.append(Global(name) if name in GLOBALS else Opaque(name))

    def stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a name that is not a string")
        if len(name) + len(module) > MAX_NAME:
            raise ValueError("a name that is too long")
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
        if not self.on_opaque():
            self.top(list).extend(items)

    def add_items(self, items: list[Any]) -> None:
        if not self.on_opaque():
            raise ValueError(f"{len(items)} items for something that is not a set")

    def frozen_set(self) -> None:
        self.pop_to_mark()
        self.stack.append(Opaque("builtins frozenset"))

    def set_items(self, items: list[Any]) -> None:
        if len(items) % 2:
            raise ValueError("a key without a value")
        if self.on_opaque():
            return
        target = self.top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashes of other keys can be chosen to collide (numbers), or be slow (nested tuples).
            target[key if isinstance(key, str) else Opaque(type(key).__name__)] = value

    def build(self, _: Any) -> None:
        # PyTorch sets the versions of modules as state of the dictionary of tensors; not needed.
        state = self.pop()
        if self.on_opaque():
            return
        if not isinstance(state, dict):
            raise self.error("its pickle sets the state of an object")
        self.top(dict)

    def reduce(self, _: Any) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, (Global, Opaque)) or not isinstance(arguments, tuple):
            raise ValueError("a call of something that is not a function")
        if isinstance(function, Opaque):
            self.stack.append(function)
        elif function.name == ORDERED_DICT and not arguments:
            self.stack.append({})
        elif function.name == REBUILD_TENSOR and 6 <= len(arguments) <= 7:
            opaque = isinstance(arguments[0], Opaque)
            self.stack.append(arguments[0] if opaque else self._tensor(*arguments[:4]))
        elif PARAMETERS.get(function.name) == len(arguments):
            if not isinstance(arguments[0], (TensorView, Opaque)):
                raise ValueError("a parameter that is not a tensor")
            self.stack.append(arguments[0])
        else:
            raise self.error(
                f"its pickle calls {function.name.replace(' ', '.')} with unexpected arguments"
            )

    def new(self, count: int) -> None:
        """NEWOBJ, NEWOBJ_EX: create an object of a class, which must be opaque."""
        arguments = [self.pop() for _ in range(count)]
        if not self.on_opaque() or not isinstance(arguments[-1], tuple):
            raise self.error(
                "for something that is not a class, its pickle uses the instruction NEWOBJ"
            )

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any) -> TensorView:
        numbers = [offset, *shape, *strides]
        if not isinstance(storage, Storage) or any(type(n) is not int for n in numbers):
            raise ValueError("a tensor with an invalid storage, shape or stride")
        if not all(0 <= n < MAX_COUNT for n in numbers):
            raise ValueError("a tensor with a size or stride out of range")
        if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
            raise ValueError(f"a tensor with {len(shape)} sizes and {len(strides)} strides")
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if last >= storage.items and 0 not in shape:
            raise ValueError("a tensor that reaches beyond its storage")
        return TensorView(storage, offset, tuple(shape), tuple(strides))

    def persistent_id(self, _: Any) -> None:
        match self.pop():
            case ("storage", Global(name=kind), str(key), str(), int(items)) if kind in STORAGES:
                if not re.fullmatch(r"[0-9]{1,9}", key):
                    raise self.error(f"a storage is called {key[:40]!r}")
                if items < 0:
                    raise ValueError("a storage of negative size")
                self.stack.append(Storage(kind, key, items))
            case ("storage", Opaque() as kind, str(), str(), int()):
                self.stack.append(kind)  # a type that is not supported
            case _:
                raise ValueError("a reference to something that is not a storage")


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
    "POP": _Machine.drop,
    "POP_MARK": _Machine.drop_to_mark,
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
    "EMPTY_SET": lambda m, a: m.stack.append(Opaque("builtins set")),
    "ADDITEMS": lambda m, a: m.add_items(m.pop_to_mark()),
    "FROZENSET": lambda m, a: m.frozen_set(),
    "BUILD": _Machine.build,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": lambda m, a: m.new(1),
    "NEWOBJ_EX": lambda m, a: m.new(2),
    "BINPERSID": _Machine.persistent_id,
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {  # these push their argument
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES", "BYTEARRAY8"),
}
_KNOWN = {"STOP", *_STEPS, *_CONSTANTS, *_LITERALS}
