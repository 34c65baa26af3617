"""Read the operations of an ML program, in the order in which they run.

An ML program has no branches: each operation takes earlier values and names its results.

Source of message and field numbers: coremltools 9.0 `mlmodel/format/Model.proto`, `MIL.proto`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import CheckpointError
from .constants import (
    MAX_DIMENSIONS,
    Constant,
    TensorType,
    decompress,
    from_blob,
    from_values,
)
from .package import Package
from .protobuf import Budget, Message

ML_PROGRAM = 502  # field of a model; other kinds of models use other fields
WEIGHT_FILES = ("@model_path/weights/weight.bin", "weights/weight.bin")
MAX_OPERATIONS = 20_000  # including constants; FastViTHD has 2,000
UNKNOWN_SIZE = -1


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation that is computed when the model runs.

    Attributes:
        kind: Type of operation, such as "conv".
        inputs: Names of the values passed to each parameter, without constants. Parameters with
            several values are numbered: "values.0".
        constants: Constants passed to each parameter.
        outputs: Name and type of each result.
    """

    kind: str
    inputs: dict[str, str]
    constants: dict[str, Constant]
    outputs: dict[str, TensorType]

    @property
    def description(self) -> str:
        """Description of the operation for error messages."""
        return f"operation {self.kind[:40]} {next(iter(self.outputs), '')[:80]!r}"


@dataclass(slots=True)
class Program:
    """The program of a package.

    Attributes:
        where: Name of the package in messages.
        inputs: Names and types of the inputs.
        operations: Operations in the order in which they run, without constants.
        constants: All constants by name.
        outputs: Names of the results.
    """

    where: str
    inputs: dict[str, TensorType] = field(default_factory=dict)
    operations: list[Operation] = field(default_factory=list)
    constants: dict[str, Constant] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)


def read_program(path: Path, where: str) -> Program:
    """Read the program of a package; the data of its constants is read lazily.

    Args:
        path: The .mlpackage directory.
        where: Its name in messages.

    Raises:
        CheckpointError: the package is incomplete, damaged, or not a simple ML program.
    """
    package = Package(path, where)
    budget = Budget(where)
    model = Message(memoryview(package.model()), budget)
    if not model.has(ML_PROGRAM):
        raise CheckpointError(
            f"{where}: holds no ML program, but a model of an older type, which is not supported"
        )
    functions = model.message(ML_PROGRAM).map(2)
    if set(functions) != {"main"}:
        names = ", ".join(functions)[:80]
        raise CheckpointError(f"{where}: has the functions {names} instead of main alone")
    main = functions["main"]
    blocks = main.map(3)
    if main.text(2) not in blocks:
        raise budget.error("the function has no body")
    return _Reader(package, budget, where).program(main, blocks[main.text(2)])


class _Reader:
    """Reads the operations of one function."""

    def __init__(self, package: Package, budget: Budget, where: str):
        self.package, self.budget = package, budget
        self.result = Program(where)
        self.defined: set[str] = set()

    def program(self, function: Message, block: Message) -> Program:
        for entry in function.messages(1):
            name = entry.text(1)
            self._define(name)
            self.result.inputs[name] = self._type(entry.message(2))
        operations = block.messages(3)
        if len(operations) > MAX_OPERATIONS:
            raise CheckpointError(
                f"{self.result.where}: has {len(operations)} operations, more than {MAX_OPERATIONS}"
            )
        for message in operations:
            self._operation(message)
        self.result.outputs = block.texts(2)
        for name in self.result.outputs:
            self._check_defined(name)
        return self.result

    def _operation(self, message: Message) -> None:
        kind = message.text(1)
        outputs = {e.text(1): self._type(e.message(2)) for e in message.messages(3)}
        if not outputs:
            raise self.budget.error(f"an operation {kind[:40]} without result")
        first = next(iter(outputs))
        if message.has(4):
            raise CheckpointError(
                f"{self.result.where}: operation {kind[:40]} {first[:80]!r} contains nested "
                "operations, unlike any known tower"
            )
        inputs: dict[str, str] = {}
        constants: dict[str, Constant] = {}
        for parameter, argument in message.map(2).items():
            bindings = argument.messages(1)
            for i, binding in enumerate(bindings):
                key = parameter if len(bindings) == 1 else f"{parameter}.{i}"
                name = binding.text(1)
                if binding.has(2):
                    constants[key] = self._value(f"{first}.{key}", binding.message(2))
                elif name in self.result.constants:
                    constants[key] = self.result.constants[name]
                else:
                    self._check_defined(name)
                    inputs[key] = name
        if kind == "const" or kind.startswith("constexpr_"):
            for parameter, value in message.map(5).items():
                if parameter != "name":
                    constants[parameter] = self._value(f"{first}.{parameter}", value)
            self._constant(kind, first, outputs[first], constants)
        else:
            self.result.operations.append(Operation(kind, inputs, constants, outputs))
        for name in outputs:
            self._define(name)

    def _constant(
        self, kind: str, name: str, type_: TensorType, arguments: dict[str, Constant]
    ) -> None:
        if kind != "const":
            self.result.constants[name] = decompress(
                kind, name, type_, arguments, self.result.where
            )
        elif "val" in arguments:
            value = arguments["val"]
            self.result.constants[name] = Constant(name, value.type, value.read)
        else:
            raise self.budget.error(f"constant {name[:80]!r} without a value")

    def _value(self, name: str, message: Message) -> Constant:
        type_ = self._type(message.message(2))
        if message.has(5):
            file = message.message(5)
            if file.text(1) not in WEIGHT_FILES:
                raise CheckpointError(
                    f"{self.result.where}: constant {name[:80]!r} is in {file.text(1)[:80]!r}; "
                    "only weights/weight.bin is read"
                )
            blob = self.package.blob(file.number(2))
            return from_blob(name, type_, blob, self.result.where)
        values = self._immediate(message.message(3).message(1))
        if values is None or not type_.code:  # lists and dictionaries
            return Constant(name, TensorType(0, ()), lambda: np.zeros(0))
        return from_values(name, type_, values, self.result.where)

    def _immediate(self, tensor: Message) -> NDArray[Any] | None:
        """The flat elements of a tensor value; None if it has none."""
        if tensor.has(1):
            return np.array(tensor.message(1).floats(1), np.float32)
        for number in (2, 5):  # int32 and int64
            if tensor.has(number):
                return np.array(tensor.message(number).integers(1), np.int64)
        if tensor.has(3):
            return np.array(tensor.message(3).integers(1), np.bool_)
        if tensor.has(4):
            return np.array(tensor.message(4).texts(1), object)
        if tensor.has(7):
            return np.frombuffer(tensor.message(7).data(1), np.uint8)
        return None

    def _type(self, message: Message) -> TensorType:
        """The type of a value; with code 0 if it is not a tensor."""
        tensor = message.message(1)
        dimensions = tensor.messages(3)
        if len(dimensions) > MAX_DIMENSIONS:
            raise self.budget.error(f"an array of {len(dimensions)} dimensions")
        shape = tuple(
            size.message(1).number(1) if size.has(1) else UNKNOWN_SIZE for size in dimensions
        )
        return TensorType(tensor.number(1), shape)

    def _define(self, name: str) -> None:
        if name in self.defined:
            raise self.budget.error(f"{name[:80]!r} is defined twice")
        self.defined.add(name)

    def _check_defined(self, name: str) -> None:
        if name not in self.defined:
            raise self.budget.error(f"{name[:80]!r} is used before it is defined")
