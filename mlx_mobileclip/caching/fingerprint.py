"""Identify the weights of a model, by a hash of their content or by reference."""

import hashlib
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..checkpoints.weights import named_parameters


def fingerprint(module: nn.Module, *settings: object) -> str:
    """Hash a module's weights, with their names, shapes and dtypes, and its settings.

    Args:
        module: A model or one of its towers.
        settings: Anything else that the result depends on, such as a config; hashed as its `repr`.

    Returns:
        64 hexadecimal digits; about 0.15 s for a text tower in float32.
    """
    return _hash(named_parameters(module), settings)


class Weights:
    """The weights that a cached result was computed from, held by reference.

    Two are the same if they hold the same arrays. Writing into an array (`weight[...] = x`) is
    not detected.
    """

    def __init__(self, *modules: nn.Module | list[Any]):
        """Reference the current weights of modules or lists of modules."""
        self._arrays = _arrays(modules)

    def same_as(self, other: "Weights") -> bool:
        """Whether both hold the same arrays."""
        mine, others = self._arrays, other._arrays
        return len(mine) == len(others) and all(a is b for a, b in zip(mine, others, strict=True))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the content, 64 hexadecimal digits."""
        return _hash({str(i): array for i, array in enumerate(self._arrays)}, ())


def _hash(arrays: dict[str, mx.array], settings: tuple[object, ...]) -> str:
    digest = hashlib.sha256(repr(settings).encode())
    for name, value in sorted(arrays.items()):
        digest.update(f"{name} {value.dtype} {value.shape}\n".encode())
        # NumPy has no bfloat16; only the bits matter here.
        bits = value.view(mx.uint16) if value.dtype == mx.bfloat16 else value
        digest.update(np.ascontiguousarray(np.asarray(bits)).data)
    return digest.hexdigest()


def _arrays(tree: Any) -> list[mx.array]:
    """Arrays in a tree of modules, dicts and lists, in a fixed order."""
    arrays, stack = [], [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, mx.array):
            arrays.append(node)
        elif isinstance(node, dict):  # modules are dicts
            stack += [value for name, value in node.items() if not name.startswith("_")]
        elif isinstance(node, (list, tuple)):
            stack += node
    return arrays
