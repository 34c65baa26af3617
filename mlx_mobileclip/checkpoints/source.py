"""The tensors of a source checkpoint, each taken exactly once.

Readers request tensors by a common name (see `layout.py`) and the shape they must have. Arrays
stay lazy, so names and shapes of a whole checkpoint are checked before any data is read.
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
        """Take ownership of the tensors; `name` translates a common name to this layout."""
        self._tensors = tensors
        self._name = name
        self.where = where
        self.nhwc = nhwc
        self._missing: list[str] = []
        self._misshapen: list[str] = []

    def has(self, name: str) -> bool:
        """Whether the tensor exists and is not yet taken."""
        return self._name(name) in self._tensors

    def key(self, name: str) -> str:
        """Translate the common name of a tensor or module to this layout."""
        return self._name(name)

    def take(self, name: str, shape: Shape, dtypes: Iterable[mx.Dtype] = FLOATS) -> mx.array:
        """Take a tensor; if it is missing or misshapen, return zeros, and `finish` will raise."""
        key, dtypes = self._name(name), tuple(dtypes)
        tensor = self._tensors.pop(key, None)
        if tensor is None:
            self._missing.append(key)
        elif tensor.shape != shape:
            self._misshapen.append(f"{key} has shape {tensor.shape} instead of {shape}")
        elif tensor.dtype not in dtypes:
            self._misshapen.append(f"{key} is {tensor.dtype}")
        else:
            return tensor
        return mx.zeros(shape, dtypes[0])

    def conv(self, name: str, shape: Shape) -> mx.array:
        """Take a convolution weight of shape (O, I, H, W), as float64 in that order of axes."""
        if not self.nhwc:
            return self._float64(name, shape)
        O, I, H, W = shape  # noqa: E741
        return mx.transpose(self._float64(name, (O, H, W, I)), (0, 3, 1, 2), stream=mx.cpu)

    def vector(self, name: str, size: int) -> mx.array:
        """Take a vector, as float64."""
        return self._float64(name, (size,))

    def scale(self, name: str, size: int) -> mx.array:
        """Take a layer scale, stored as (C, 1, 1) or NHWC's (1, 1, C), as a float64 vector."""
        shape = (1, 1, size) if self.nhwc else (size, 1, 1)
        return mx.reshape(self._float64(name, shape), (size,), stream=mx.cpu)

    def _float64(self, name: str, shape: Shape) -> mx.array:
        return self.take(name, shape).astype(mx.float64, stream=mx.cpu)  # a GPU has no float64

    def drop(self, pattern: str) -> None:
        """Discard the tensors whose names in this layout match."""
        for key in [key for key in self._tensors if re.search(pattern, key)]:
            del self._tensors[key]

    def finish(self) -> None:
        """Raise CheckpointError unless all requested tensors existed and none is left."""
        problems = []
        if self._missing:
            problems.append(f"{len(self._missing)} missing: {name_some(self._missing)}")
        if self._tensors:
            left = sorted(self._tensors)
            problems.append(f"{len(left)} with no place in the model: {name_some(left)}")
        if self._misshapen:
            problems.append(f"{len(self._misshapen)} misshapen: {name_some(self._misshapen, 4)}")
        if problems:
            raise CheckpointError(
                f"{self.where}: tensors do not fit the model its config describes; "
                + "; ".join(problems)
            )


def without_prefixes(
    tensors: dict[str, mx.array], prefixes: tuple[str, ...]
) -> dict[str, mx.array]:
    """Remove the prefixes that wrappers have added to all names."""
    while tensors:
        prefix = next((p for p in prefixes if all(key.startswith(p) for key in tensors)), None)
        if prefix is None:
            break
        tensors = {key[len(prefix) :]: tensor for key, tensor in tensors.items()}
    return tensors
