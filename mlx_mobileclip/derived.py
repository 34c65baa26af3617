"""What a layer computes from its weights, kept until it has other weights."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .device import backend

KEPT = "_kept"  # name in the layer; not a parameter, as it begins with an underscore


def derived(
    layer: nn.Module, make: Callable[[nn.Module, list[mx.array]], Any], weights: list[mx.array]
) -> Any:
    """make(layer, weights), one or more arrays, from the layer if it has them already."""
    kept = layer.get(KEPT)
    if kept and kept[0] is make and all(a is b for a, b in zip(kept[1], weights, strict=True)):
        return kept[2]
    value = make(layer, weights)
    # Only the thread that created a lazy array can evaluate it.
    evaluate = mx.eval if backend() == "cpu" else mx.async_eval
    try:
        evaluate(value)
    except ValueError:  # within transformations such as mx.compile, weights have no values
        return value
    layer[KEPT] = make, weights, value
    return value


def release(model: nn.Module) -> None:
    """Drop what was computed from earlier weights."""
    for layer in model.modules():
        layer.pop(KEPT, None)
