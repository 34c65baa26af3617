"""Cache of values that layers derive from their weights, until the weights change."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .device import backend

CACHE = "_derived"  # attribute of the layer; the underscore excludes it from parameters


def derived(
    layer: nn.Module, make: Callable[[nn.Module, list[mx.array]], Any], weights: list[mx.array]
) -> Any:
    """Return make(layer, weights), one or more arrays, cached in the layer."""
    entry = layer.get(CACHE)
    if entry and entry[0] is make and all(a is b for a, b in zip(entry[1], weights, strict=True)):
        return entry[2]
    value = make(layer, weights)
    # Only the thread that created a lazy array can evaluate it.
    evaluate = mx.eval if backend() == "cpu" else mx.async_eval
    try:
        evaluate(value)
    except ValueError:  # within transformations such as mx.compile, weights have no values
        return value
    layer[CACHE] = make, weights, value
    return value


def release(model: nn.Module) -> None:
    """Drop the cached values of all layers."""
    for layer in model.modules():
        layer.pop(CACHE, None)
