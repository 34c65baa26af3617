"""Depthwise convolution as matrix products.

Unnecessary once MLX's CPU backend has a vectorised depthwise convolution; today it computes one
number at a time. Here each channel is a product: patches of the input times a banded matrix, which
holds the kernel once for each output of a tile. It takes two to four times the arithmetic, but is
three to 20 times as fast (AMD EPYC, two cores, MLX 0.32.4 with OpenBLAS, 2026-11-23).
"""

from functools import cache

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from .executor import EXPANSION, cores, in_parts
from .rows import FeatureMap, Rows, join

ROWS, COLUMNS = 4, 4  # tile of outputs that one row of a product computes
ODD_FROM = 32  # tiles per row; from here odd counts, as powers of two cause cache conflicts
MIN_POSITIONS = 128  # per core; products of fewer rows are much slower


def depthwise_conv(x: FeatureMap, banded: mx.array, kernel_size: int, stride: int) -> FeatureMap:
    """Depthwise k x k convolution with "same" padding.

    Args:
        x: (B, H, W, C). Given `Rows`, each part of the result waits only for the strips it reads.
        banded: The kernels, from `banded_matrix`.
        kernel_size: Side of the kernels.
        stride: 1 or 2.

    Returns:
        (B, H/s, W/s, C times the number of kernels), sizes rounded up; `Rows` unless there are too
        few positions.
    """
    B, H, W, C = x.shape
    strips = x if isinstance(x, Rows) else Rows([x])
    rows, columns = -(-H // stride), -(-W // stride)

    def work(start: int, stop: int) -> mx.array:
        y = _rows_of_tiles(strips, banded, kernel_size, stride, start, stop)
        return y[:, : min(stop * ROWS, rows) - start * ROWS, :columns]

    parts = in_parts(work, -(-rows // ROWS), work_size=EXPANSION * B * H * W * C)
    if len(parts) == 1 or B * rows * columns < MIN_POSITIONS * cores():
        return join(parts)
    return Rows(parts)


def banded_matrix(weights: list[mx.array], stride: int) -> mx.array:
    """Build the banded matrix for `depthwise_conv`.

    Args:
        weights: Kernels, (C, k, k, 1) each; their outputs for each channel are adjacent.
        stride: 1 or 2.

    Returns:
        (C, patch, kernels * tile).
    """
    channels, kernel_size = weights[0].shape[:2]
    tap_index = _taps(kernel_size, stride)
    banded = []
    for weight in weights:
        taps = mx.pad(weight.reshape(channels, -1), [(0, 0), (0, 1)])  # zero for index k * k
        banded.append(taps[:, mx.array(tap_index.ravel())].reshape(channels, *tap_index.shape))
    return mx.concatenate(banded, axis=-1)


def _rows_of_tiles(
    x: Rows, banded: mx.array, kernel_size: int, stride: int, start: int, stop: int
) -> mx.array:
    """Compute the output of tile rows `start` to `stop`, (B, (stop - start) * ROWS, padded W, ...).

    The input is reordered to channel, row, column within a patch, tile across. In that order the
    patches of a row of tiles form a matrix with fixed strides, which BLAS reads without a copy.
    Patches of vertically adjacent tiles overlap in memory.
    """
    B, _, W, C = x.shape
    k, s = kernel_size, stride
    tiles_down, tiles_across = stop - start, -(-W // (COLUMNS * s))
    if tiles_across >= ODD_FROM:
        tiles_across |= 1
    patch_height, patch_width = (ROWS - 1) * s + k, (COLUMNS - 1) * s + k
    height, width = (tiles_down * ROWS - 1) * s + k, (tiles_across * COLUMNS - 1) * s + k
    top = start * ROWS * s - k // 2
    padded = mx.zeros((B, height, C, width), x.dtype)
    row = max(-top, 0)
    for strip in x.between(max(top, 0), top + height):
        padded[:, row : row + strip.shape[1], :, k // 2 : k // 2 + W] = strip.swapaxes(2, 3)
        row += strip.shape[1]
    ordered = mx.as_strided(
        padded,
        (B, C, height, patch_width, tiles_across),
        (height * C * width, width, C * width, 1, COLUMNS * s),
    )
    row_stride = patch_width * tiles_across  # in `ordered`
    patches = mx.as_strided(
        ordered,
        (B, tiles_down, C, tiles_across, patch_height * patch_width),
        (C * height * row_stride, ROWS * s * row_stride, height * row_stride, 1, tiles_across),
    )
    y = (patches @ banded).reshape(B, tiles_down, C, tiles_across, -1, ROWS, COLUMNS)
    y = y.transpose(0, 1, 5, 3, 6, 2, 4)
    return y.reshape(B, tiles_down * ROWS, tiles_across * COLUMNS, -1)


@cache
def _taps(kernel_size: int, stride: int) -> NDArray[np.int32]:
    """Index of the kernel weight between each input of a patch and each output of a tile.

    Returns:
        (patch, tile); k * k where there is none.
    """
    patch_height, patch_width = ((n - 1) * stride + kernel_size for n in (ROWS, COLUMNS))
    tap_index = np.full((patch_height, patch_width, ROWS, COLUMNS), kernel_size**2, np.int32)
    taps = np.arange(kernel_size**2).reshape(kernel_size, kernel_size)
    for row in range(ROWS):
        for column in range(COLUMNS):
            top, left = row * stride, column * stride
            tap_index[top : top + kernel_size, left : left + kernel_size, row, column] = taps
    return tap_index.reshape(patch_height * patch_width, ROWS * COLUMNS)
