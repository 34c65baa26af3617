"""A feature map in strips of rows, each computed by one core and not yet joined.

Unnecessary once MLX's CPU backend runs an operation on several threads.
"""

import operator
from collections.abc import Callable
from functools import wraps
from itertools import accumulate
from typing import Any

import mlx.core as mx

from .executor import each


class Rows:
    """A (B, H, W, C) feature map as strips of rows, from top to bottom.

    Position-wise operations (see `positionwise`) run strip by strip, on the core that computed the
    strip and still has it in its cache.
    """

    def __init__(self, strips: list[mx.array]):
        """Keep the strips, (B, h, W, C) each; core i computed strip i."""
        self.strips = strips
        self.heights = [strip.shape[1] for strip in strips]

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, H, W, C) of the whole map."""
        B, _, W, C = self.strips[0].shape
        return B, sum(self.heights), W, C

    @property
    def dtype(self) -> mx.Dtype:
        """Type of the elements."""
        return self.strips[0].dtype

    def between(self, first: int, last: int) -> list[mx.array]:
        """Rows `first` up to `last`, one piece for each strip that has some of them."""
        pieces, top = [], 0
        for strip in self.strips:
            bottom = top + strip.shape[1]
            if top < last and first < bottom:
                pieces.append(strip[:, max(first - top, 0) : last - top])
            top = bottom
        return pieces

    def __add__(self, other: Any) -> "Rows":
        """Add an array that broadcasts, or a feature map."""
        result: Rows = map_rows(operator.add, self, other)
        return result


FeatureMap = mx.array | Rows


def map_rows(function: Callable[..., Any], *arguments: Any) -> Any:
    """Apply a function to the same rows of all its feature maps, strip by strip.

    Args:
        function: Returns one feature map or a tuple of several.
        *arguments: At least one `Rows`; arrays that are feature maps are split like the first one,
            everything else is passed unchanged.

    Returns:
        `Rows`, or a tuple of them.
    """
    first = next(a for a in arguments if isinstance(a, Rows))
    tops = list(accumulate(first.heights, initial=0))

    def rows(x: Any, i: int) -> Any:
        if isinstance(x, Rows):
            aligned = x.heights == first.heights
            return x.strips[i] if aligned else join(x.between(tops[i], tops[i + 1]))
        is_map = isinstance(x, mx.array) and x.ndim == 4
        return x[:, tops[i] : tops[i + 1]] if is_map else x

    results = each(lambda i: function(*(rows(x, i) for x in arguments)), len(first.strips))
    if isinstance(results[0], tuple):
        return tuple(Rows(list(strips)) for strips in zip(*results, strict=True))
    return Rows(results)


def positionwise(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a position-wise function accept `Rows` as well as arrays."""

    @wraps(function)
    def wrapper(*arguments: Any) -> Any:
        if any(isinstance(a, Rows) for a in arguments):
            return map_rows(function, *arguments)
        return function(*arguments)

    return wrapper


def join(strips: list[mx.array]) -> mx.array:
    """Concatenate strips of rows."""
    return strips[0] if len(strips) == 1 else mx.concatenate(strips, axis=1)


def whole(x: FeatureMap) -> mx.array:
    """The feature map as one array."""
    return join(x.strips) if isinstance(x, Rows) else x
