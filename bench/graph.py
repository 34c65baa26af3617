"""Read the graph that MLX would run on an Apple GPU, without running it.

Graphs are lazy, so that of a full-size model takes neither memory nor computation if its weights
are broadcast zeros. On a machine without a GPU two things are emulated: MLX reports Metal as the
device, so that this package chooses its implementations for it, and operations that MLX splits up
on a CPU count as the single kernel that they are on a GPU.
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

from mlx_mobileclip.gpu.queue import WorkQueue

# Primitives that do not move data. A Reshape copies non-contiguous input, which is only known at
# run time; such copies are not counted for anyone.
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
# Head widths for which Metal has an attention kernel; with others attention is split up
# (MLX 0.32.4 mlx/backend/metal/scaled_dot_product_attention.cpp).
FUSED_HEADS = (64, 72, 80, 96, 128)

Array = tuple[str, tuple[int, ...], mx.Dtype]  # as exported: name, shape, dtype


@dataclass(frozen=True, slots=True)
class Kernel:
    """An evaluated primitive.

    Attributes:
        name: MLX's name; depthwise convolutions are called "DepthwiseConvolution".
        bytes: Bytes read and written.
        flops: FLOP of a matrix product, convolution or attention; 0 for all else.
    """

    name: str
    bytes: int
    flops: int = 0


@dataclass(frozen=True, slots=True)
class _Call:
    """A call that runs as one kernel on a GPU."""

    name: str
    inputs: list[mx.array]
    outputs: list[mx.array]


def leaf(array: mx.array) -> mx.array:
    """Zeros of the same shape and dtype, without a graph and with almost no memory."""
    zeros = mx.broadcast_to(mx.zeros((), array.dtype), array.shape)
    mx.eval(zeros)
    return zeros


def make_weightless(model: nn.Module, dtype: mx.Dtype = mx.float16) -> None:
    """Replace all parameters with broadcast zeros, floats of `dtype`."""
    model.set_dtype(dtype)
    model.update(tree_map(leaf, model.parameters()))


class Graphs:
    """Reads graphs; created by `gpu_graphs`."""

    def __init__(self) -> None:
        self._calls: list[_Call] = []
        self._in_call = False  # within a recorded call

    def kernels(self, build: Callable[[], Any]) -> list[Kernel]:
        """Kernels that evaluating the arrays returned by `build` would run, in no fixed order."""
        self._calls.clear()
        results = arrays(build())
        calls = list(self._calls)
        roots = results + [array for call in calls for array in call.inputs]
        entries: list[dict[str, Any]] = []
        # Without arguments nothing is traced again, so the existing graph is exported.
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

    def as_one_kernel(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that each call counts as one kernel and returns leaves."""

        def record_call(*arguments: Any, **options: Any) -> Any:
            if self._in_call:  # part of another kernel, such as a compiled function
                return function(*arguments, **options)
            self._in_call = True
            try:
                result = tree_map(leaf, function(*arguments, **options))
            finally:
                self._in_call = False
            self._calls.append(_Call(name, arrays([arguments, options]), arrays(result)))
            return result

        return record_call


class _Sizes:
    """Bytes of the arrays of an exported graph; a view has at most those of its source."""

    def __init__(self, primitives: list[dict[str, Any]]) -> None:
        self._view_bytes: dict[str, int] = {}
        for entry in primitives:
            if entry["name"] in VIEWS:
                source = self.of(entry["inputs"][0])
                for output in entry["outputs"]:
                    self._view_bytes[output[0]] = min(source, _bytes(output))

    def of(self, array: Array) -> int:
        return self._view_bytes.get(array[0], _bytes(array))

    def traffic(self, entry: dict[str, Any]) -> int:
        written = sum(_bytes(output) for output in entry["outputs"])
        read = [self.of(array) for array in entry["inputs"]]
        if entry["name"] == "SliceUpdate":  # in place
            return 2 * read[1]
        if entry["name"] == "Gather":  # only the gathered rows
            return 2 * written + sum(read[1:])
        return written + sum(read)


def _name(entry: dict[str, Any]) -> str:
    depthwise = entry["name"] == "Convolution" and entry["inputs"][1][1][-1] == 1
    return "DepthwiseConvolution" if depthwise else entry["name"]


def _flops(entry: dict[str, Any]) -> int:
    if entry["name"] in ("AddMM", "Matmul", "QuantizedMatmul"):
        reduced_size = entry["inputs"][0][1][-1]
    elif entry["name"] == "Convolution":
        reduced_size = prod(entry["inputs"][1][1][1:])
    else:
        return 0
    return 2 * prod(entry["outputs"][0][1]) * reduced_size


def _attention_flops(call: _Call) -> int:
    if call.name != "ScaledDotProductAttention":
        return 0
    queries, keys = call.inputs[:2]
    return 4 * queries.size * keys.shape[2]  # including masked positions


def _bytes(array: Array) -> int:
    _, shape, dtype = array
    return prod(shape) * dtype.size


def arrays(tree: Any) -> list[mx.array]:
    """Arrays among the leaves of a tree."""
    leaves: Any = tree_flatten(tree)
    return [value for _, value in leaves if isinstance(value, mx.array)]


@contextmanager
def gpu_graphs() -> Iterator[Graphs]:
    """Make MLX build graphs as on a Mac within the block; create models in it too."""
    graphs = Graphs()
    attend = mx.fast.scaled_dot_product_attention
    attend_fused = graphs.as_one_kernel("ScaledDotProductAttention", attend)

    def attend_as_metal(queries: mx.array, *arguments: Any, **options: Any) -> mx.array:
        function = attend_fused if queries.shape[-1] in FUSED_HEADS else attend
        return function(queries, *arguments, **options)

    with ExitStack() as stack:

        def patch(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        patch(mx, "default_device", lambda: mx.Device(mx.gpu))
        patch(mx.metal, "is_available", lambda: True)
        patch(WorkQueue, "add", lambda *_: None)  # it would evaluate the graph
        for owner, name, primitive in ONE_KERNEL:
            patch(owner, name, graphs.as_one_kernel(primitive, getattr(owner, name)))
        patch(mx.fast, "scaled_dot_product_attention", attend_as_metal)
        compiled = type(nn.gelu)
        for module in list(sys.modules.values()):
            for name, value in list(vars(module).items() if module else ()):
                if type(value) is compiled:  # isinstance triggers deprecation warnings
                    patch(module, name, graphs.as_one_kernel("Compiled", value))
        yield graphs
