"""Compare the parts of a model on the device with their plain forms in float32 on the CPU.

A model in training mode computes the plain forms on every device, so the reference shares neither
kernels nor formulations with what it checks. Both take the same numbers: weights and pixels,
rounded to the dtype of the device. A part has weights only while it is compared, so a model of any
size needs the memory of its largest part.
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
from ..layers import release, whole
from ..quantization import dequantize

Run = Callable[[Any, mx.array], mx.array]  # of a model and an input to an output
Parts = dict[str, slice]  # positions (axis 1) that are compared separately


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison.

    Attributes:
        stage: What was compared, such as "stage 2" or "decoder layer 0".
        part: Which part of the stage, such as "block 3"; may be empty.
        error: Relative error, given the input of the reference; NaN if it could not be computed.
        bound: Largest error that rounding explains.
        chain_error: Relative error, given the outputs of the device so far; None if there are none.
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


Step = Callable[[], list[Row]]  # makes one or more comparisons


@contextmanager
def plain() -> Iterator[None]:
    """Compute on the CPU within the block, without compiled functions.

    MLX would compile those for the CPU with the C++ compiler of the system, if there is one.
    """
    mx.disable_compile()
    try:
        with mx.stream(mx.cpu):
            yield
    finally:
        mx.enable_compile()


def relative_error(exact: mx.array, actual: mx.array) -> float:
    """Root mean square over the positions of norm(a - b) / norm(a), the norms over the channels.

    Positions with a norm below the median are compared with the median. So a few very large
    positions, as decoders have them, do not hide errors of the others, and a position that is
    almost zero does not count as wrong.

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
    """A result, or MLX's message if it cannot be computed, as where a kernel is missing."""
    try:
        result = run()
        mx.eval(result)
    except RuntimeError as error:
        return None, " ".join(str(error).split())
    return result, ""


class Models:
    """A model on the device and its plain form, whose parts have weights only while in use.

    Attributes:
        device: The model as it is used.
        plain: The model with floats for quantised layers, in training mode.
        dtype: dtype of the weights on the device.
        loaded: The weights in use, as the device has them.
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
            tables: Layers that are too large in float32; the plain model gets no weights for them.

        Raises:
            CheckpointError: the tensors do not fit the config.
        """
        self._read, self._tables = read, tables
        self.config, self._tensors = read()
        self.device, self.plain = build(self.config), build(replace(self.config, quantization={}))
        self.device.eval()
        self.plain.train()
        self.dtype = dtype
        self.loaded: Tensors = {}
        check_fit(self.device, self._tensors, where)
        self.weight_bytes = sum(as_dtype(x, dtype).nbytes for x in self._tensors.values())

    @contextmanager
    def weights(self, *prefixes: str) -> Iterator[None]:
        """Load the weights under some prefixes, once, and release them at the end of the block."""
        names = [name for name in self._tensors if name.startswith(prefixes)]
        self.loaded = {n: as_dtype(row_major(self._tensors.pop(n)), self.dtype) for n in names}
        mx.eval(self.loaded)
        self.device.load_weights(list(self.loaded.items()), strict=False)
        with plain():
            floats = {
                name: self.rows(name.removesuffix(".weight"))
                if name.endswith(".weight")
                else value.astype(mx.float32)
                for name, value in self.loaded.items()
                if self._is_plain(name)
            }
            mx.eval(floats)
        self.plain.load_weights(list(floats.items()), strict=False)
        del floats
        try:
            yield
        finally:
            nothing = [(name, mx.zeros(())) for name in self.loaded]
            self.device.load_weights(nothing, strict=False)
            self.plain.load_weights([(n, x) for n, x in nothing if self._is_plain(n)], strict=False)
            release(self.device)
            self.loaded = {}

    def read_again(self) -> None:
        """Make all weights available again, for parts that share them with an earlier one."""
        _, self._tensors = self._read()

    def rows(self, path: str, rows: Any = slice(None)) -> mx.array:
        """Rows of a loaded layer's weight in float32, lazy; those of quantised ones dequantised."""
        tensors = {
            name: as_dtype(self.loaded[f"{path}.{name}"][rows], mx.float32)
            for name in ("weight", "scales", "biases")
            if f"{path}.{name}" in self.loaded
        }
        quantization = self.config.quantization.get(path)
        if quantization is None:
            return tensors["weight"]
        return dequantize(tensors, quantization, mx.float32)

    def _is_plain(self, name: str) -> bool:
        """Whether the plain model has this tensor: no scales, and no rows of large tables."""
        path, _, parameter = name.rpartition(".")
        scale = path in self.config.quantization and parameter in ("scales", "biases")
        return not scale and path not in self._tables


class Chain:
    """Compares one part after another.

    Attributes:
        exact: Output of the reference so far, float32.
        chained: Output of the device so far, from its own outputs; None once that has failed.
    """

    def __init__(self, models: Models, x: mx.array, bound: float):
        """Start with the input of the first part."""
        self._models, self._bound = models, bound
        x = self._rounded(x)
        self.exact = x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x
        self.chained: mx.array | None = x

    def layer(self, stage: str, part: str, path: str, **options: Any) -> list[Row]:
        """Compare the layer at a path of the model, which takes the output of the part before."""

        def run(model: nn.Module, x: mx.array) -> mx.array:
            return whole(dict(model.named_modules())[path](x, **options))

        return self.step(stage, part, (f"{path}.",), run)

    def step(
        self,
        stage: str,
        part: str,
        prefixes: tuple[str, ...],
        run: Run,
        plain_run: Run | None = None,
        parts: Parts | None = None,
    ) -> list[Row]:
        """Compare a part of the model.

        Args:
            stage: Name of the stage.
            part: Name of the part within the stage.
            prefixes: Of the names of its weights.
            run: Runs it.
            plain_run: Runs it in float32 on the CPU; `run` if not given.
            parts: Positions to compare separately, by the name of the part.

        Returns:
            A row for each of `parts`, or one.
        """
        with self._models.weights(*prefixes):
            x = self._rounded(self.exact)
            with plain():
                self.exact = (plain_run or run)(self._models.plain, self.exact)
                mx.eval(self.exact)
            actual, failure = on_device(partial(run, self._models.device, x))
            if self.chained is not None:
                self.chained, _ = on_device(partial(run, self._models.device, self.chained))
        rows = []
        for name, positions in (parts or {part: slice(None)}).items():
            error, chain_error = (
                None
                if value is None
                else relative_error(_at(self.exact, positions), _at(value, positions))
                for value in (actual, self.chained)
            )
            error = float("nan") if error is None else error
            rows.append(Row(stage, name, error, self._bound, chain_error, failure))
        return rows

    def _rounded(self, x: mx.array) -> mx.array:
        return x.astype(self._models.dtype) if mx.issubdtype(x.dtype, mx.floating) else x


def _at(x: mx.array, positions: slice) -> mx.array:
    return x if positions == slice(None) else x[:, positions]
