"""The tensors of a source checkpoint, each taken exactly once.

Converters ask for tensors by a common name (timm's for image towers, Hugging Face's for the
decoder) and by the shape they must have. Arrays stay lazy, so a whole checkpoint is checked by
names and shapes before any of its data is read.
"""

import re
from collections.abc import Callable, Iterable

import mlx.core as mx

from ..errors import CheckpointError, name_some
from .weights import FLOATS

Shape = tuple[int, ...]
Tensors = dict[str, mx.array]


class Source:
    """Tensors of one checkpoint under the names of one layout.

    Attributes:
        where: The checkpoint's name, for messages.
        nhwc: Whether convolution weights are (O, H, W, I) instead of PyTorch's (O, I, H, W).
    """

    def __init__(
        self,
        tensors: dict[str, mx.array],
        name: Callable[[str], str],
        where: str,
        nhwc: bool = False,
    ):
        """Take over the tensors; `name` turns a common name into this layout's."""
        self._tensors = tensors
        self._name = name
        self.where = where
        self.nhwc = nhwc
        self._missing: list[str] = []
        self._misfits: list[str] = []

    def has(self, name: str) -> bool:
        """Whether the tensor is there and not yet taken."""
        return self._name(name) in self._tensors

    def key(self, name: str) -> str:
        """What this layout calls the tensor or module of a common name."""
        return self._name(name)

    def take(self, name: str, shape: Shape, dtypes: Iterable[mx.Dtype] = FLOATS) -> mx.array:
        """Take a tensor; one that is missing or misshapen is noted for `finish`."""
        key, dtypes = self._name(name), tuple(dtypes)
        tensor = self._tensors.pop(key, None)
        if tensor is None:
            self._missing.append(key)
        elif tensor.shape != shape:
            self._misfits.append(f"{key} has shape {tensor.shape} instead of {shape}")
        elif tensor.dtype not in dtypes:
            self._misfits.append(f"{key} is {tensor.dtype}")
        else:
            return tensor
        return mx.zeros(shape, dtypes[0])

    def conv(self, name: str, shape: Shape) -> mx.array:
        """Take a convolution weight, given its (O, I, H, W) shape, in that order and float64."""
        if not self.nhwc:
            return self._float64(name, shape)
        O, I, H, W = shape  # noqa: E741
        return mx.transpose(self._float64(name, (O, H, W, I)), (0, 3, 1, 2), stream=mx.cpu)

    def vector(self, name: str, size: int) -> mx.array:
        """Take a vector, in float64."""
        return self._float64(name, (size,))

    def scale(self, name: str, size: int) -> mx.array:
        """Take a layer scale, stored as (C, 1, 1) or NHWC's (1, 1, C), as a float64 vector."""
        shape = (1, 1, size) if self.nhwc else (size, 1, 1)
        return mx.reshape(self._float64(name, shape), (size,), stream=mx.cpu)

    def _float64(self, name: str, shape: Shape) -> mx.array:
        return self.take(name, shape).astype(mx.float64, stream=mx.cpu)  # a GPU has no float64

    def drop(self, pattern: str) -> None:
        """Discard the tensors whose names, in this layout, match."""
        for key in [key for key in self._tensors if re.search(pattern, key)]:
            del self._tensors[key]

    def finish(self) -> None:
        """Raise CheckpointError unless everything asked for was there and nothing is left."""
        problems = []
        if self._missing:
            problems.append(f"{len(self._missing)} missing: {name_some(self._missing)}")
        if self._tensors:
            left = sorted(self._tensors)
            problems.append(f"{len(left)} with no place in the model: {name_some(left)}")
        if self._misfits:
            problems.append(f"{len(self._misfits)} unfit: {name_some(self._misfits, 4)}")
        if problems:
            raise CheckpointError(
                f"{self.where}: tensors do not fit the model its config describes; "
                + "; ".join(problems)
            )


def without_prefixes(
    tensors: dict[str, mx.array], prefixes: tuple[str, ...]
) -> dict[str, mx.array]:
    """The tensors without the prefixes that wrappers have put before every name."""
    while tensors:
        prefix = next((p for p in prefixes if all(key.startswith(p) for key in tensors)), None)
        if prefix is None:
            break
        tensors = {key[len(prefix) :]: tensor for key, tensor in tensors.items()}
    return tensors
