"""The graph that MLX would run on an Apple GPU, read without running it.

Graphs are lazy, so those of a full-size model cost neither memory nor arithmetic as long as its
weights are broadcast zeros. On a machine without a GPU they differ in two ways, both put right
here: MLX's questions about the device are answered as on a Mac, so that this package chooses its
formulations for it, and what MLX takes apart for a CPU counts as the one kernel it is.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

# Primitives that only describe memory anew. A Reshape copies if rows do not lie in order, which
# is known only when it runs; such copies are counted for nobody.
VIEWS = (
    "AsStrided",
    "Broadcast",
    "BroadcastAxes",
    "Depends",
    "ExpandDims",
    "Flatten",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "StopGradient",
    "Transpose",
    "Unflatten",
)
ONE_KERNEL = (
    (mx.fast, "layer_norm", "LayerNorm"),
    (mx.fast, "rms_norm", "RMSNorm"),
    (mx.fast, "rope", "RoPE"),
    (mx, "dequantize", "Dequantize"),
)
# Widths of a head that Metal attends to in one kernel; at others it is taken apart there too
# (MLX 0.32.4 mlx/backend/metal/scaled_dot_product_attention.cpp).
FUSED_HEADS = (64, 72, 80, 96, 128)

Array = tuple[str, tuple[int, ...], mx.Dtype]  # as exported: name, shape, type


@dataclass(frozen=True, slots=True)
class Kernel:
    """One evaluated primitive.

    Attributes:
        name: MLX's; convolutions of one input per output are called "DepthwiseConvolution".
        bytes: Read and written.
        flops: Of a product (of matrices, of convolution, of attention); 0 for all else.
    """

    name: str
    bytes: int
    flops: int = 0


@dataclass(frozen=True, slots=True)
class _Call:
    """A call that a GPU answers with one kernel."""

    name: str
    inputs: list[mx.array]
    outputs: list[mx.array]


def leaf(array: mx.array) -> mx.array:
    """Zeros of the same shape and type, with no graph and next to no memory."""
    zeros = mx.broadcast_to(mx.zeros((), array.dtype), array.shape)
    mx.eval(zeros)
    return zeros


def make_weightless(model: nn.Module, dtype: mx.Dtype = mx.float16) -> None:
    """Turn all parameters into leaves, those of floating point into `dtype`."""
    model.set_dtype(dtype)
    model.update(tree_map(leaf, model.parameters()))


class Graphs:
    """Reads graphs; made by `gpu_graphs`."""

    def __init__(self) -> None:
        self._calls: list[_Call] = []
        self._inside = False  # a call that is noted

    def kernels(self, build: Callable[[], Any]) -> list[Kernel]:
        """What evaluating the arrays that `build` returns would run, in no particular order."""
        self._calls.clear()
        results = arrays(build())
        calls = list(self._calls)
        roots = results + [array for call in calls for array in call.inputs]
        entries: list[dict[str, Any]] = []
        # Without arguments nothing is traced anew: exported is the graph as it stands.
        mx.export_function(entries.append, lambda: roots)
        primitives = [entry for entry in entries if entry["type"] == "primitive"]
        (outputs,) = (entry["outputs"] for entry in entries if entry["type"] == "outputs")
        sizes = _Sizes(primitives)
        inputs = iter(outputs[len(results) :])
        kernels = [
            Kernel(_name(entry), sizes.traffic(entry), _flops(entry))
            for entry in primitives
            if entry["name"] not in VIEWS
        ]
        for call in calls:
            read = sum(sizes.of(next(inputs)) for _ in call.inputs)
            written = sum(array.nbytes for array in call.outputs)
            kernels.append(Kernel(call.name, read + written, _attention_flops(call)))
        return kernels

    def noting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, noted as one kernel at each call; what it returns are leaves."""

        def noted(*arguments: Any, **options: Any) -> Any:
            if self._inside:  # of a compiled function, which is all one kernel
                return function(*arguments, **options)
            self._inside = True
            try:
                result = tree_map(leaf, function(*arguments, **options))
            finally:
                self._inside = False
            self._calls.append(_Call(name, arrays([arguments, options]), arrays(result)))
            return result

        return noted


class _Sizes:
    """Bytes behind the arrays of an exported graph: a view has those of what it shows."""

    def __init__(self, primitives: list[dict[str, Any]]) -> None:
        self._shown: dict[str, int] = {}
        for entry in primitives:
            if entry["name"] in VIEWS:
                source = self.of(entry["inputs"][0])
                for output in entry["outputs"]:
                    self._shown[output[0]] = min(source, _bytes(output))

    def of(self, array: Array) -> int:
        return self._shown.get(array[0], _bytes(array))

    def traffic(self, entry: dict[str, Any]) -> int:
        written = sum(_bytes(output) for output in entry["outputs"])
        read = [self.of(array) for array in entry["inputs"]]
        if entry["name"] == "SliceUpdate":  # in place
            return 2 * read[1]
        if entry["name"] == "Gather":  # the rows asked for, not the table
            return 2 * written + sum(read[1:])
        return written + sum(read)


def _name(entry: dict[str, Any]) -> str:
    depthwise = entry["name"] == "Convolution" and entry["inputs"][1][1][-1] == 1
    return "DepthwiseConvolution" if depthwise else entry["name"]


def _flops(entry: dict[str, Any]) -> int:
    if entry["name"] in ("AddMM", "Matmul", "QuantizedMatmul"):
        summed = entry["inputs"][0][1][-1]
    elif entry["name"] == "Convolution":
        summed = prod(entry["inputs"][1][1][1:])
    else:
        return 0
    return 2 * prod(entry["outputs"][0][1]) * summed


def _attention_flops(call: _Call) -> int:
    if call.name != "ScaledDotProductAttention":
        return 0
    queries, keys = call.inputs[:2]
    return 4 * queries.size * keys.shape[2]  # what a causal mask hides is counted too


def _bytes(array: Array) -> int:
    _, shape, dtype = array
    return prod(shape) * dtype.size


def arrays(tree: Any) -> list[mx.array]:
    """Those among the leaves of a tree."""
    leaves: Any = tree_flatten(tree)
    return [value for _, value in leaves if isinstance(value, mx.array)]


@contextmanager
def gpu_graphs() -> Iterator[Graphs]:
    """Within the block MLX builds the graphs that it would on a Mac; models are made there too."""
    graphs = Graphs()
    attend = mx.fast.scaled_dot_product_attention
    attend_fused = graphs.noting("ScaledDotProductAttention", attend)

    def attend_as_metal(queries: mx.array, *arguments: Any, **options: Any) -> mx.array:
        chosen = attend_fused if queries.shape[-1] in FUSED_HEADS else attend
        return chosen(queries, *arguments, **options)

    with ExitStack() as stack:

        def put(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        put(mx, "default_device", lambda: mx.Device(mx.gpu))
        put(mx.metal, "is_available", lambda: True)
        for owner, name, primitive in ONE_KERNEL:
            put(owner, name, graphs.noting(primitive, getattr(owner, name)))
        put(mx.fast, "scaled_dot_product_attention", attend_as_metal)
        compiled = type(nn.gelu)
        for module in list(sys.modules.values()):
            for name, value in list(vars(module).items() if module else ()):
                if type(value) is compiled:  # isinstance would wake deprecated objects
                    put(module, name, graphs.noting("Compiled", value))
        yield graphs
