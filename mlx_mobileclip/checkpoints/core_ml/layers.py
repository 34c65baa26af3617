"""Extract the layers of a program, in the order of the dataflow.

A layer is an operation with weights, an activation or a softmax. A tower is a chain of layers:
each uses the output of the one before, possibly reshaped, added or multiplied in between. Names of
operations are not used.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import CheckpointError
from .constants import Constant
from .program import Operation, Program

# Operations without weights that may be between layers. All others are refused, as they could
# change the result unnoticed.
WITHOUT_WEIGHTS = {
    *("add", "sub", "mul", "real_div", "square", "pow", "sqrt", "rsqrt", "matmul"),
    *("reshape", "transpose", "squeeze", "expand_dims", "split", "concat", "stack", "tile"),
    *("slice_by_index", "slice_by_size", "gather", "gather_nd", "gather_along_axis"),
    *("reduce_mean", "reduce_sum", "reduce_argmax", "avg_pool", "cast", "identity"),
    *("reduce_l2_norm", "l2_norm", "maximum", "clip"),  # embeddings scaled to length 1
    *("shape", "fill", "range_1d", "greater_equal", "less", "select"),  # indices
}
# Operations with weights, and the parameters that hold them.
WEIGHTS = {
    "conv": ("weight", "bias"),
    "linear": ("weight", "bias"),
    "matmul": ("y",),
    "layer_norm": ("gamma", "beta"),
    "batch_norm": ("gamma", "beta", "mean", "variance"),
    "gather": ("x",),
    "add": ("x", "y"),
    "mul": ("x", "y"),
    "concat": ("values.0",),
    "scaled_dot_product_attention": ("attn_mask",),
}
ACTIVATIONS = ("gelu", "relu", "sigmoid", "softmax")
MAX_SETTING = 16  # elements of a setting, such as padding
PIXEL_SCALE = 1 / 255  # image inputs are scaled to values from 0 to 1


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer.

    Attributes:
        kind: "conv", "linear", "layer_norm", "batch_norm", "gather", "add", "mul", "concat", or
            an activation.
        description: Its description in messages.
        weights: Weights by parameter; the constant of an "add", "mul" or "concat" is "y".
        settings: Other constants by parameter.
        input_kind: Kind of the operation that computes its input; empty for an input of the
            program.
    """

    kind: str
    description: str
    weights: dict[str, Constant]
    settings: dict[str, Constant]
    input_kind: str

    def integers(self, parameter: str) -> tuple[int, ...]:
        """The integers of a setting; empty if there are none."""
        values = self._values(parameter)
        return tuple(int(n) for n in values) if values.dtype.kind in "iub" else ()

    def text(self, parameter: str) -> str:
        """The text of a setting; empty if there is none."""
        values = self._values(parameter)
        return str(values[0]) if values.size == 1 and values.dtype.kind == "O" else ""

    def number(self, parameter: str) -> float:
        """The number of a setting; 0 if there is none."""
        values = self._values(parameter)
        return float(values[0]) if values.size == 1 and values.dtype.kind == "f" else 0.0

    def _values(self, parameter: str) -> NDArray[Any]:
        constant = self.settings.get(parameter)
        if constant is None or constant.type.elements > MAX_SETTING:
            return np.zeros(0)
        return constant.read().reshape(-1)


def layers_of(program: Program) -> tuple[list[Layer], list[str]]:
    """Return the layers of a program in order, and the names of unused float arrays.

    Raises:
        CheckpointError: the layers do not form a chain, or an operation or its use of weights is
            not known.
    """
    result: list[Layer] = []
    depends_on = dict.fromkeys(program.inputs, -1)  # by value: index of the last layer before it
    kinds = dict.fromkeys(program.inputs, "")  # by value: kind of the operation that computes it
    used: set[str] = set()
    for operation in program.operations:
        previous = max((depends_on[name] for name in operation.inputs.values()), default=-1)
        layers = _layers(operation, next((kinds[n] for n in operation.inputs.values()), ""))
        _check_arrays(operation, layers, program.where)
        if not layers:
            _check(operation, program.where, first=previous < 0)
        elif previous != len(result) - 1:
            raise CheckpointError(
                f"{program.where}: {operation.description} does not use the layer before it, "
                "unlike any known tower"
            )
        result += layers
        for name in operation.outputs:
            depends_on[name] = len(result) - 1 if layers else previous
            kinds[name] = operation.kind
        used.update(constant.name for constant in operation.constants.values())
    unused = [n for n, c in program.constants.items() if is_array(c) and n not in used]
    return result, unused


def is_array(constant: Constant) -> bool:
    """Whether a constant can hold weights: a float array with more than one element."""
    return constant.type.is_float and constant.type.elements > 1


def _layers(operation: Operation, input_kind: str) -> list[Layer]:
    """Return the layers of an operation, usually one or none."""
    kind, names = operation.kind, WEIGHTS.get(operation.kind, ())
    weights = {n: c for n, c in operation.constants.items() if n in names and is_array(c)}
    settings = {n: c for n, c in operation.constants.items() if n not in weights}
    if kind in ACTIVATIONS or (kind in WEIGHTS and weights):
        if kind in ("add", "mul", "concat"):
            weights = {"y": next(iter(weights.values()))} if len(weights) == 1 else weights
        if kind != "scaled_dot_product_attention":
            return [Layer(kind, operation.description, weights, settings, input_kind)]
    if kind == "scaled_dot_product_attention":
        masks = [
            Layer("add", operation.description, {"y": mask}, {}, input_kind)
            for mask in weights.values()
        ]
        return [*masks, Layer("softmax", operation.description, {}, {}, input_kind)]
    return []


def _check_arrays(operation: Operation, layers: list[Layer], where: str) -> None:
    """Check that every float array of an operation is a weight of its layers."""
    weights = [constant for layer in layers for constant in layer.weights.values()]
    for parameter, constant in operation.constants.items():
        if is_array(constant) and constant not in weights:
            raise CheckpointError(
                f"{where}: {operation.description} has weights as its {parameter[:40]!r}, unlike "
                "any known tower"
            )


def _check(operation: Operation, where: str, *, first: bool) -> None:
    """Check an operation that is not a layer; `first` if no layer comes before it."""
    if operation.kind not in WITHOUT_WEIGHTS:
        raise CheckpointError(
            f"{where}: {operation.description} is of a kind that no known tower has"
        )
    for constant in operation.constants.values():
        if first and constant.type.is_float and operation.kind in ("add", "sub", "mul", "real_div"):
            value = constant.read().reshape(-1)
            neutral = {"mul": (1, PIXEL_SCALE), "real_div": (1, 255)}.get(operation.kind, (0,))
            if not any(np.allclose(value, each, rtol=1e-3, atol=0) for each in neutral):
                raise CheckpointError(
                    f"{where}: {operation.description} prepares pixels with {value[:1]}; known "
                    "towers take them from 0 to 1"
                )


def without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without leading axes of size 1."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape
