"""The first convolution of a tower, divided among cores by rows.

Unnecessary once MLX's CPU backend runs convolutions on several threads.
"""

import mlx.core as mx

from .executor import in_parts
from .rows import FeatureMap, Rows


def conv3x3_stride2(pixels: mx.array, weight: mx.array) -> FeatureMap:
    """3x3 convolution with stride 2 and padding 1.

    Args:
        pixels: (B, H, W, 3).
        weight: (C, 3, 3, 3).

    Returns:
        (B, H/2, W/2, C), sizes rounded up.
    """
    padded = mx.pad(pixels, [(0, 0), (1, 1), (1, 1), (0, 0)])

    def work(start: int, stop: int) -> mx.array:
        return mx.conv2d(padded[:, 2 * start : 2 * stop + 1], weight, stride=2)

    B, H, W, _ = pixels.shape
    rows, columns = -(-H // 2), -(-W // 2)
    patches = B * rows * columns * weight.size // len(weight)
    strips = in_parts(work, rows, patches)
    return strips[0] if len(strips) == 1 else Rows(strips)
