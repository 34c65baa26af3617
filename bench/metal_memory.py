"""Simulate the memory use of an image tower on a Mac: `python -m bench.metal_memory`.

The graph is evaluated in the order and by the rules of MLX 0.32.4 (mlx/transforms.cpp,
mlx/backend/metal/eval.cpp and device.cpp): a command buffer is committed after more than 40
kernels or 40 Mi elements in the arrays they use, its inputs are held until it has completed, and
the host waits when eleven are queued. The slowest GPU does nothing until the host waits for it;
the fastest completes at once. Nothing here measures a GPU.
"""

import argparse
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from math import prod
from typing import Any
from unittest import mock

import mlx.core as mx

from mlx_mobileclip import layers
from mlx_mobileclip.gpu import elementwise, queue
from mlx_mobileclip.models.fastvit import PRESETS, FastViT

from .graph import VIEWS, leaf, make_weightless
from .record import table

MAX_OPERATIONS, MAX_ELEMENTS, MAX_QUEUED = 40, 40 << 20, 10
# Kernels that may reuse an input's buffer (mlx/backend/common/unary.h, binary.h).
IN_PLACE = ("Add", "Multiply", "Sigmoid", "Maximum", "AsType")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tower", choices=PRESETS, default="fastvithd")
    parser.add_argument("--resolution", type=int, default=1024, metavar="R")
    parser.add_argument("--batch", type=int, default=1, metavar="B")
    args = parser.parse_args()
    rows = []
    for label, pieces in (("one evaluation, as before", False), ("in pieces", True)):
        for speed, keeps_up in (("slowest GPU", False), ("fastest GPU", True)):
            machine = simulate(args.tower, args.resolution, args.batch, pieces, keeps_up)
            rows.append((label, speed, f"{machine.peak / 1e9:.3f}", str(machine.committed)))
    print(table(("evaluation", "GPU", "peak above weights, GB", "command buffers"), rows))


class Machine:
    """Simulated memory and command buffers."""

    def __init__(self, keeps_up: bool):
        self.live = self.peak = self.committed = 0
        self._keeps_up = keeps_up
        self._references: dict[int, int] = {}  # reference count of each buffer
        self._sizes: dict[int, int] = {}
        self._held: list[int] = []  # by the current command buffer
        self._operations = 0
        self._used: dict[Any, int] = {}  # elements of each array that it uses
        self._queued: deque[list[int]] = deque()

    def allocate(self, buffer: int, size: int) -> None:
        self._references[buffer], self._sizes[buffer] = 0, size
        self.live += size
        self.peak = max(self.peak, self.live)

    def hold(self, buffer: int) -> None:
        if buffer in self._references:
            self._references[buffer] += 1

    def drop(self, buffer: int) -> None:
        if buffer not in self._references:
            return
        self._references[buffer] -= 1
        if not self._references[buffer]:
            del self._references[buffer]
            self.live -= self._sizes.pop(buffer)

    def only_reference(self, buffer: int) -> bool:
        return self._references.get(buffer) == 1

    def run(self, read: list[int], used: dict[Any, int]) -> None:
        """Encode a kernel that reads these buffers, and uses arrays of these sizes."""
        for buffer in read:
            self.hold(buffer)
        self._held += read
        self._operations += 1
        self._used |= used
        if self._operations > MAX_OPERATIONS or sum(self._used.values()) > MAX_ELEMENTS:
            self.commit()
        while len(self._queued) > MAX_QUEUED:
            self.finish_one()

    def commit(self) -> int:
        """Queue the command buffer; returns the number committed so far, for `wait_for`."""
        self._queued.append(self._held)
        self._held, self._operations, self._used = [], 0, {}
        self.committed += 1
        if self._keeps_up:
            self.finish_one()
        return self.committed

    def finish_one(self) -> None:
        for buffer in self._queued.popleft():
            self.drop(buffer)

    def wait_for(self, committed: int) -> None:
        """Wait until the first `committed` command buffers have completed."""
        while self.committed - len(self._queued) < committed:
            self.finish_one()


def simulate(name: str, resolution: int, batch: int, pieces: bool, keeps_up: bool) -> Machine:
    """Run a tower's graph in float16, evaluated at once or in pieces as `WorkQueue` does."""
    nodes, outputs = graph(name, resolution, batch)
    machine = Machine(keeps_up)
    evaluation = Evaluation(nodes, machine)
    waiting: deque[tuple[str, int, int]] = deque()  # output, command buffers committed, bytes
    size = 0
    for output, nbytes in outputs if pieces else outputs[-1:]:
        size += queue.MAPS * nbytes
        if pieces and size < queue.PIECE_BYTES and output != outputs[-1][0]:
            continue
        while waiting and size + sum(n for *_, n in waiting) > queue.QUEUED_BYTES:
            done, committed, _ = waiting.popleft()
            machine.wait_for(committed)
            evaluation.release(done)
        evaluation.evaluate(output)
        waiting.append((output, machine.commit(), size))
        size = 0
    return machine


def graph(
    name: str, resolution: int, batch: int
) -> tuple[list[dict[str, Any]], list[tuple[str, int]]]:
    """Return a tower's primitives in topological order, and the (name, bytes) of each output."""
    tower = FastViT(PRESETS[name]).eval()
    make_weightless(tower)
    parts: list[mx.array] = []
    with ExitStack() as stack:

        def patch(owner: Any, name: str, value: Callable[..., Any]) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        patch(layers, "on_cpu", lambda: False)
        patch(queue.WorkQueue, "add", lambda _, x: parts.append(x))
        # Stand-ins with the same output shapes; each is one kernel on a GPU.
        patch(elementwise, "gelu", mx.sigmoid)
        patch(elementwise, "bias_gelu", lambda x, bias: x * bias)
        patch(
            elementwise, "add_biases", lambda x, b: x[None] * b.astype(x.dtype)[:, None, None, None]
        )
        patch(mx.fast, "layer_norm", lambda x, weight, bias, eps: x * weight)
        patch(mx.fast, "scaled_dot_product_attention", lambda q, k, v, **_: q * k * v)
        tower(leaf(mx.zeros((batch, resolution, resolution, 3), mx.float16)))
    entries: list[dict[str, Any]] = []
    mx.export_function(entries.append, lambda: parts)
    (names,) = (entry["outputs"] for entry in entries if entry["type"] == "outputs")
    nodes = [entry for entry in entries if entry["type"] == "primitive"]
    return nodes, [(n, prod(shape) * dtype.size) for n, shape, dtype in names]


class Evaluation:
    """Evaluates a graph as MLX does; a result is held until all its consumers have run."""

    def __init__(self, nodes: list[dict[str, Any]], machine: Machine):
        self.machine = machine
        self._nodes = nodes
        self._producer = {output[0]: node for node in nodes for output in node["outputs"]}
        self._uses: dict[str, int] = {}
        for node in nodes:
            for name, *_ in node["inputs"]:
                self._uses[name] = self._uses.get(name, 0) + 1
        self._buffer: dict[str, int] = {}  # buffer of each array computed so far
        self._next = 0

    def evaluate(self, root: str) -> None:
        needed, stack = set[int](), [root]
        while stack:
            node = self._producer.get(stack.pop())
            if node is None or id(node) in needed or node["outputs"][0][0] in self._buffer:
                continue
            needed.add(id(node))
            stack += [name for name, *_ in node["inputs"]]
        for node in self._nodes:
            if id(node) in needed:
                self._run(node)
        self.machine.hold(self._buffer[root])  # Python's reference

    def release(self, output: str) -> None:
        """Drop Python's reference to an evaluated array."""
        self.machine.drop(self._buffer[output])

    def _run(self, node: dict[str, Any]) -> None:
        read = [self._buffer[name] for name, *_ in node["inputs"] if name in self._buffer]
        is_view = node["name"] in VIEWS and bool(read)
        in_place = node["name"].startswith(IN_PLACE) and bool(read)
        donated = in_place and _bytes(node["inputs"][0]) == _bytes(node["outputs"][0])
        if is_view or (donated and self.machine.only_reference(read[0])):
            buffer = read[0]
        else:
            self._next += 1
            buffer = self._next
            self.machine.allocate(buffer, sum(map(_bytes, node["outputs"])))
        for output in node["outputs"]:
            self._buffer[output[0]] = buffer
            for _ in range(self._uses.get(output[0], 0)):
                self.machine.hold(buffer)
        if not is_view:
            arrays = (*node["inputs"], *node["outputs"])
            used = {self._buffer.get(name, name): prod(shape) for name, shape, _ in arrays}
            self.machine.run([b for b in read if b != buffer], used)
        for held in read:
            self.machine.drop(held)


def _bytes(array: Any) -> int:
    _, shape, dtype = array
    return int(prod(shape) * dtype.size)


if __name__ == "__main__":
    main()
