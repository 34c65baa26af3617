"""Depthwise convolution, in the form that is fast on the device at hand."""

from functools import cache, partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from .device import on_all_cores, on_cpu

ROWS, COLUMNS = 4, 4  # of the tile of outputs that one row of a product computes


class Depthwise(nn.Module):
    """Depthwise k x k convolution, "same" padding, no bias.

    MLX's CPU backend convolves one number at a time, so there, in float32, it is done as matrix
    products: for each channel, patches of the input times a banded matrix that holds the kernel
    once for each output of a tile. That is two to four times the arithmetic, at up to 17 times
    the speed (AMD EPYC, two cores, MLX 0.32.4 with OpenBLAS, 2026-11-23).
    """

    def __init__(self, channels: int, kernel_size: int, stride: int = 1):
        """Start with a kernel of zeros; a stride is 1 or 2."""
        super().__init__()
        self.weight = mx.zeros((channels, kernel_size, kernel_size, 1))
        self._stride = stride
        self._banded: tuple[mx.array, mx.array] | None = None  # kernel, and its banded matrix

    def __call__(self, x: mx.array) -> mx.array:
        """(B, H, W, C) to (B, H/s, W/s, C), sizes rounded up."""
        channels, kernel_size = self.weight.shape[:2]
        single = x.dtype == self.weight.dtype == mx.float32
        if single and not self.training and on_cpu():
            return _by_products(x, self._banded_matrix(), kernel_size, self._stride)
        return mx.conv2d(x, self.weight, self._stride, kernel_size // 2, groups=channels)

    def _banded_matrix(self) -> mx.array:
        """The kernel at each of a tile's places, (C, patch, tile), made anew for a new kernel."""
        weight = self.weight
        if self._banded is None or self._banded[0] is not weight:
            channels, kernel_size = weight.shape[:2]
            places = _places(kernel_size, self._stride)
            taps = mx.pad(weight.reshape(channels, -1), [(0, 0), (0, 1)])  # and a zero
            banded = taps[:, mx.array(places.ravel())].reshape(channels, *places.shape)
            self._banded = weight, banded
        return self._banded[1]


def _by_products(x: mx.array, banded: mx.array, kernel_size: int, stride: int) -> mx.array:
    B, H, W, _ = x.shape
    patches = partial(_patches, kernel_size=kernel_size, stride=stride)
    multiply = partial(_multiply, banded=banded)
    views = patches(x)
    if B == 1:
        y = on_all_cores(multiply, (views, 1), axis=1, makes=views.size)
    else:  # so that padding is divided too
        y = on_all_cores(lambda x: multiply(patches(x)), (x, 0), axis=0, makes=views.size)
    return y[:, : -(-H // stride), : -(-W // stride)]


def _patches(x: mx.array, kernel_size: int, stride: int) -> mx.array:
    """What each tile of outputs is computed from: overlapping views of the padded input.

    Returns:
        (B, tiles down, C, tiles across, patch height, patch width). This order, by rows of tiles
        and then channels, keeps to the cache.
    """
    B, H, W, C = x.shape
    k, s = kernel_size, stride
    tiles_down, tiles_across = -(-H // (ROWS * s)), -(-W // (COLUMNS * s))
    height, width = (tiles_down * ROWS - 1) * s + k, (tiles_across * COLUMNS - 1) * s + k
    before = k // 2
    margins = [(0, 0), (before, height - H - before), (0, 0), (before, width - W - before)]
    return mx.as_strided(
        mx.pad(x.swapaxes(2, 3), margins),  # (B, height, C, width)
        (B, tiles_down, C, tiles_across, (ROWS - 1) * s + k, (COLUMNS - 1) * s + k),
        (height * C * width, ROWS * s * C * width, width, COLUMNS * s, C * width, 1),
    )


def _multiply(patches: mx.array, banded: mx.array) -> mx.array:
    """Tiles of outputs, put side by side: (B, tiles down * ROWS, tiles across * COLUMNS, C)."""
    B, tiles_down, C, tiles_across = patches.shape[:4]
    y = patches.reshape(B * tiles_down, C, tiles_across, -1) @ banded
    y = y.reshape(B, tiles_down, C, tiles_across, ROWS, COLUMNS).transpose(0, 1, 4, 3, 5, 2)
    return y.reshape(B, tiles_down * ROWS, tiles_across * COLUMNS, C)


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
