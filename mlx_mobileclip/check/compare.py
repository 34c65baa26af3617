"""Compare a model on the device, layer by layer, with a reference in float32 on the CPU.

The reference is the same model in training mode, which uses MLX's basic operations only, so it
shares no optimised kernel with what it checks. Both have the same weights and pixels, rounded to
the dtype of the device. A layer has weights only while it is compared, so a model of any size needs
the memory of its largest layer.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..checkpoints.source import Tensors
from ..checkpoints.weights import as_dtype, check_fit, row_major
from ..derived import release
from ..layers import whole
from ..quantization import dequantize

Run = Callable[[Any, mx.array], mx.array]  # from a model and its input to an output
Parts = dict[str, slice]  # ranges of positions (axis 1), compared separately, by name


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison.

    Attributes:
        stage: What was compared, such as "stage 2" or "decoder layer 0".
        part: Which part of the stage, such as "block 3"; may be empty.
        error: Relative error on the reference's input; NaN if it could not be computed.
        bound: Upper bound of the rounding error.
        chain_error: Relative error accumulated since the first layer, on the device's own input;
            None if a layer before it failed.
        failure: MLX's message, if the device could not compute it.
    """

    stage: str
    part: str
    error: float
    bound: float
    chain_error: float | None = None
    failure: str = ""

    @property
    def right(self) -> bool:
        """Whether the error is within its bound; NaN is not."""
        return self.error <= self.bound

    @property
    def name(self) -> str:
        """Stage and part."""
        return f"{self.stage} ({self.part})" if self.part else self.stage


Step = Callable[[], list[Row]]  # makes one comparison or several


@contextmanager
def on_reference_device() -> Iterator[None]:
    """Compute on the CPU within the block, without compiled functions.

    MLX would build those for the CPU with the system's C++ compiler, if there is one.
    """
    mx.disable_compile()
    try:
        with mx.stream(mx.cpu):
            yield
    finally:
        mx.enable_compile()


def relative_error(exact: mx.array, actual: mx.array) -> float:
    """Root mean square over the positions of norm(a - b) / norm(a), the norms over the channels.

    Norms below the median are replaced by the median. So a few very large positions, as decoders
    have them, do not hide errors of the others, nor does a position near zero count as wrong.

    Args:
        exact: (..., C).
        actual: The same shape.
    """
    a, b = (np.array(x.astype(mx.float32)).reshape(-1, x.shape[-1]) for x in (exact, actual))
    with np.errstate(invalid="ignore", over="ignore"):  # infinite values are errors, too
        norms = np.linalg.norm(a, axis=1)
        scales = np.maximum(norms, np.median(norms)) + np.finfo(np.float32).tiny
        errors = np.linalg.norm(a - b, axis=1) / scales
        return float(np.sqrt(np.mean(errors**2)))


def on_device(run: Callable[[], mx.array]) -> tuple[mx.array | None, str]:
    """Evaluate; return the result, or None and MLX's message, as if a kernel is missing."""
    try:
        result = run()
        mx.eval(result)
    except RuntimeError as error:
        return None, " ".join(str(error).split())
    return result, ""


class Models:
    """A model on the device and its reference; layers have weights only while in use.

    Attributes:
        device: The model as it is used.
        reference: The model in training mode, with quantised layers dequantised.
        dtype: dtype of the weights on the device.
        loaded: The weights in use, as on the device.
        weight_bytes: Size of all weights on the device.
    """

    def __init__(
        self,
        build: Callable[[Any], nn.Module],
        read: Callable[[], tuple[Any, Tensors]],
        dtype: mx.Dtype,
        where: str,
        tables: tuple[str, ...] = (),
    ):
        """Read the checkpoint's config and lazy tensors.

        Args:
            build: Builds a model from a config.
            read: Reads config and lazy tensors, anew at each call.
            dtype: dtype of the weights on the device.
            where: The checkpoint's name, for messages.
            tables: Embedding and output layers, too large in float32: the reference gets no weights
                for them.

        Raises:
            CheckpointError: the tensors do not fit the config.
        """
        self._read, self._tables = read, tables
        self.config, self._tensors = read()
        self.device, self.reference = (
            build(self.config),
            build(replace(self.config, quantization={})),
        )
        self.device.eval()
        self.reference.train()
        self.dtype = dtype
        self.loaded: Tensors = {}
        check_fit(self.device, self._tensors, where)
        self.weight_bytes = sum(as_dtype(x, dtype).nbytes for x in self._tensors.values())

    @contextmanager
    def weights(self, *prefixes: str) -> Iterator[None]:
        """Load the weights with these prefixes, and release them at the end of the block."""
        names = [name for name in self._tensors if name.startswith(prefixes)]
        self.loaded = {n: as_dtype(row_major(self._tensors.pop(n)), self.dtype) for n in names}
        mx.eval(self.loaded)
        self.device.load_weights(list(self.loaded.items()), strict=False)
        with on_reference_device():
            floats = {
                name: self.rows(name.removesuffix(".weight"))
                if name.endswith(".weight")
                else value.astype(mx.float32)
                for name, value in self.loaded.items()
                if self._in_reference(name)
            }
            mx.eval(floats)
        self.reference.load_weights(list(floats.items()), strict=False)
        del floats
        try:
            yield
        finally:
            nothing = [(name, mx.zeros(())) for name in self.loaded]
            self.device.load_weights(nothing, strict=False)
            self.reference.load_weights(
                [(n, x) for n, x in nothing if self._in_reference(n)], strict=False
            )
            release(self.device)
            self.loaded = {}

    def read_again(self) -> None:
        """Make all weights available again, for layers that share them with an earlier one."""
        _, self._tensors = self._read()

    def rows(self, path: str, rows: Any = slice(None)) -> mx.array:
        """Rows of a loaded layer's weight, dequantised if necessary: float32, lazy."""
        tensors = {
            name: as_dtype(self.loaded[f"{path}.{name}"][rows], mx.float32)
            for name in ("weight", "scales", "biases")
            if f"{path}.{name}" in self.loaded
        }
        quantization = self.config.quantization.get(path)
        if quantization is None:
            return tensors["weight"]
        return dequantize(tensors, quantization, mx.float32)

    def _in_reference(self, name: str) -> bool:
        """Whether the reference has this tensor: neither scales nor `tables`."""
        path, _, parameter = name.rpartition(".")
        scale = path in self.config.quantization and parameter in ("scales", "biases")
        return not scale and path not in self._tables


class Chain:
    """Compares layers in order, each of which takes the output of the one before.

    Attributes:
        exact: Latest output of the reference, float32.
        chained: Latest output of the device, given its own outputs; None once a layer has failed.
    """

    def __init__(self, models: Models, x: mx.array, bound: float):
        """Start with the input of the first layer."""
        self._models, self._bound = models, bound
        x = self._rounded(x)
        self.exact = x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x
        self.chained: mx.array | None = x

    def layer(self, stage: str, part: str, path: str, **options: Any) -> list[Row]:
        """Compare the layer at a path of the model; `options` are its keyword arguments."""

        def run(model: nn.Module, x: mx.array) -> mx.array:
            return whole(dict(model.named_modules())[path](x, **options))

        return self.step(stage, part, (f"{path}.",), run)

    def step(
        self,
        stage: str,
        part: str,
        prefixes: tuple[str, ...],
        run: Run,
        run_reference: Run | None = None,
        parts: Parts | None = None,
    ) -> list[Row]:
        """Compare a part of the model.

        Args:
            stage: Name of the stage.
            part: Name of the part within the stage.
            prefixes: Prefixes of the names of its weights.
            run: Runs it.
            run_reference: Runs the reference, if differently.
            parts: Ranges of positions to compare separately, by name.

        Returns:
            A row for each of `parts`, or one.
        """
        with self._models.weights(*prefixes):
            x = self._rounded(self.exact)
            with on_reference_device():
                self.exact = (run_reference or run)(self._models.reference, self.exact)
                mx.eval(self.exact)
            actual, failure = on_device(partial(run, self._models.device, x))
            if self.chained is not None:
                self.chained, _ = on_device(partial(run, self._models.device, self.chained))
        rows = []
        for name, positions in (parts or {part: slice(None)}).items():
            error, chain_error = (
                None
                if value is None
                else relative_error(_select(self.exact, positions), _select(value, positions))
                for value in (actual, self.chained)
            )
            error = float("nan") if error is None else error
            rows.append(Row(stage, name, error, self._bound, chain_error, failure))
        return rows

    def _rounded(self, x: mx.array) -> mx.array:
        return x.astype(self._models.dtype) if mx.issubdtype(x.dtype, mx.floating) else x


def _select(x: mx.array, positions: slice) -> mx.array:
    return x if positions == slice(None) else x[:, positions]
