"""Depthwise convolution, in the form that is fast on the device at hand."""

from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from .device import WIDENED, cores, in_parts, on_cpu

ROWS, COLUMNS = 4, 4  # of the tile of outputs that one row of a product computes
ODD_FROM = 32  # tiles; in rows of more, columns a power of two apart would share lines of the cache
ENOUGH_POSITIONS = 128  # for a core; products of fewer rows are much slower than of more
Strips = list[mx.array]  # rows of images, (B, h, W, C) each, from top to bottom
Then = Callable[..., Any]


def join(strips: Strips) -> mx.array:
    """All rows, (B, H, W, C)."""
    return strips[0] if len(strips) == 1 else mx.concatenate(strips, axis=1)


class Depthwise(nn.Module):
    """Depthwise k x k convolution, "same" padding, no bias.

    MLX's CPU backend convolves one number at a time, so there, in float32, it is done as matrix
    products: for each channel, patches of the input times a banded matrix that holds the kernel
    once for each output of a tile. That is two to four times the arithmetic, at three to 20 times
    the speed (AMD EPYC, two cores, MLX 0.32.4 with OpenBLAS, 2026-11-23).
    """

    def __init__(self, channels: int, kernel_size: int, stride: int = 1):
        """Start with a kernel of zeros; a stride is 1 or 2."""
        super().__init__()
        self.weight = mx.zeros((channels, kernel_size, kernel_size, 1))
        self.stride = stride
        self._banded: tuple[list[mx.array], mx.array] | None = None  # kernels, and their matrix

    def __call__(self, x: Strips, *beside: Strips, then: Then | None = None) -> list[Any]:
        """Convolve, and go on from there.

        Args:
            x: (B, H, W, C) in all.
            *beside: What else `then` takes, (B, H/s, W/s, ...) in all.
            then: What to make of the result at each position, by itself. On a CPU it follows strip
                by strip, while the strip is in the cache, if strips are large.

        Returns:
            (B, H/s, W/s, C) in all, sizes rounded up; or what `then` makes of each strip of that.
            On a CPU there may be several, each made by one core. Strips may be cut anywhere: a
            part waits only for those that hold its rows, not until all are joined.
        """
        return _convolve(x, [self], beside, then)


class DepthwiseDouble(nn.Module):
    """Grouped k x k convolution with two outputs per input channel, plus bias.

    Stored as two depthwise halves, because MLX's fast Metal kernel needs as many outputs as
    inputs; the halves are the even and the odd output channels.
    """

    def __init__(self, channels: int, kernel_size: int, stride: int = 1):
        super().__init__()
        self.even = Depthwise(channels, kernel_size, stride)
        self.odd = Depthwise(channels, kernel_size, stride)
        self.bias = mx.zeros((2 * channels,))

    def __call__(self, x: Strips, then: Then | None = None) -> list[Any]:
        """(B, H, W, C) to (B, H/s, W/s, 2C), without the bias: what follows fuses it."""
        return _convolve(x, [self.even, self.odd], (), then)

    def add_bias(self, x: mx.array) -> mx.array:
        """The result with the bias, for a `then` that nothing else follows."""
        return x + self.bias


def _convolve(
    x: Strips, layers: list[Depthwise], beside: tuple[Strips, ...], then: Then | None
) -> list[Any]:
    """What layers that are alike but for their kernels make of an input, (B, H/s, W/s, C * layers).

    Their outputs for a channel lie side by side.
    """
    weight, stride = layers[0].weight, layers[0].stride
    then = then or _identity
    if x[0].dtype == weight.dtype == mx.float32 and not layers[0].training and on_cpu():
        return _by_products(x, _banded_matrix(layers), weight.shape[1], stride, beside, then)
    whole = join(x)
    channels, kernel_size = weight.shape[:2]
    ys = [mx.conv2d(whole, w.weight, stride, kernel_size // 2, groups=channels) for w in layers]
    y = ys[0] if len(ys) == 1 else mx.stack(ys, axis=-1).reshape(*ys[0].shape[:3], -1)
    return [then(y, *map(join, beside))]


def _identity(x: mx.array) -> mx.array:
    return x


def _banded_matrix(layers: list[Depthwise]) -> mx.array:
    """Their kernels at each of a tile's places, (C, patch, layers * tile); anew for new kernels."""
    kept, weights = layers[0]._banded, [layer.weight for layer in layers]
    if kept is None or any(a is not b for a, b in zip(kept[0], weights, strict=True)):
        channels, kernel_size = weights[0].shape[:2]
        places = _places(kernel_size, layers[0].stride)
        banded = []
        for weight in weights:
            taps = mx.pad(weight.reshape(channels, -1), [(0, 0), (0, 1)])  # and a zero
            banded.append(taps[:, mx.array(places.ravel())].reshape(channels, *places.shape))
        kept = layers[0]._banded = weights, mx.concatenate(banded, axis=-1)
    return kept[1]


def _by_products(
    x: Strips,
    banded: mx.array,
    kernel_size: int,
    stride: int,
    beside: tuple[Strips, ...],
    then: Then,
) -> list[Any]:
    B, _, W, C = x[0].shape
    H = sum(strip.shape[1] for strip in x)
    rows, columns = -(-H // stride), -(-W // stride)
    tiles_down = -(-rows // ROWS)
    at_once = B * rows * columns >= ENOUGH_POSITIONS * cores()

    def work(start: int, stop: int) -> Any:
        y = _rows_of_tiles(x, banded, kernel_size, stride, start, stop)
        first, last = start * ROWS, min(stop * ROWS, rows)
        y = y[:, : last - first, :columns]
        return then(y, *(join(_between(b, first, last)) for b in beside)) if at_once else y

    ys = in_parts(work, tiles_down, makes=WIDENED * B * H * W * C)
    return ys if at_once else [then(join(ys), *map(join, beside))]


def _between(strips: Strips, first: int, last: int) -> Strips:
    """The rows from one to another."""
    found, top = [], 0
    for strip in strips:
        bottom = top + strip.shape[1]
        if top < last and first < bottom:
            found.append(strip[:, max(first - top, 0) : last - top])
        top = bottom
    return found


def _rows_of_tiles(
    x: Strips, banded: mx.array, kernel_size: int, stride: int, start: int, stop: int
) -> mx.array:
    """Some rows of tiles of the outputs: (B, (stop - start) * ROWS, tiles across * COLUMNS, ...).

    The input is put in order of channel, row, column within a patch, and tile across. There the
    patch of each tile lies at equal distances, and those of the tiles in a row side by side: it
    is a matrix that BLAS takes as it is. Patches of tiles above each other overlap in memory.
    """
    B, _, W, C = x[0].shape
    k, s = kernel_size, stride
    tiles_down, tiles_across = stop - start, -(-W // (COLUMNS * s))
    if tiles_across >= ODD_FROM:
        tiles_across |= 1
    tall, wide = (ROWS - 1) * s + k, (COLUMNS - 1) * s + k  # of a patch
    height, width = (tiles_down * ROWS - 1) * s + k, (tiles_across * COLUMNS - 1) * s + k
    top = start * ROWS * s - k // 2
    padded = mx.zeros((B, height, C, width), x[0].dtype)
    at = max(-top, 0)
    for strip in _between(x, max(top, 0), top + height):
        padded[:, at : at + strip.shape[1], :, k // 2 : k // 2 + W] = strip.swapaxes(2, 3)
        at += strip.shape[1]
    ordered = mx.as_strided(
        padded,
        (B, C, height, wide, tiles_across),
        (height * C * width, width, C * width, 1, COLUMNS * s),
    )
    row = wide * tiles_across  # of the patches, in `ordered`
    patches = mx.as_strided(
        ordered,
        (B, tiles_down, C, tiles_across, tall * wide),
        (C * height * row, ROWS * s * row, height * row, 1, tiles_across),
    )
    y = (patches @ banded).reshape(B, tiles_down, C, tiles_across, -1, ROWS, COLUMNS)
    y = y.transpose(0, 1, 5, 3, 6, 2, 4)
    return y.reshape(B, tiles_down * ROWS, tiles_across * COLUMNS, -1)


@cache
def _places(kernel_size: int, stride: int) -> NDArray[np.int32]:
    """Which tap of the kernel weighs each input of a patch for each output of a tile.

    Returns:
        (patch, tile); the number of taps where none does.
    """
    tall, wide = ((n - 1) * stride + kernel_size for n in (ROWS, COLUMNS))
    places = np.full((tall, wide, ROWS, COLUMNS), kernel_size**2, np.int32)
    taps = np.arange(kernel_size**2).reshape(kernel_size, kernel_size)
    for row in range(ROWS):
        for column in range(COLUMNS):
            top, left = row * stride, column * stride
            places[top : top + kernel_size, left : left + kernel_size, row, column] = taps
    return places.reshape(tall * wide, ROWS * COLUMNS)
