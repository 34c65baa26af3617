"""Evaluate a model's layers on a GPU in pieces, so that few feature maps are in memory at once.

MLX does not free the inputs of queued kernels. If the GPU is slower than the host, up to eleven
command buffers are queued, of up to 40 million elements each on Metal and a billion on an H200
(MLX 0.32.4 mlx/transforms.cpp, mlx/backend/metal/device.cpp, mlx/backend/cuda/device.cpp).
"""

from collections import deque

import mlx.core as mx

MAPS = 10  # estimated intermediate arrays of a layer, each as large as its output
PIECE_BYTES = 64 << 20  # minimum size of a piece
QUEUED_BYTES = 192 << 20  # maximum queued at once, unless one layer needs more


class WorkQueue:
    """Evaluates outputs of layers asynchronously, and waits when too much is queued."""

    def __init__(self) -> None:
        self._queued: deque[tuple[mx.array, int]] = deque()  # outputs, bytes needed for each
        self._bytes = 0  # needed by layers not queued yet

    def add(self, output: mx.array) -> None:
        """Add a layer's output, which depends on those added before; evaluates it if due."""
        self._bytes += MAPS * output.nbytes
        if self._bytes < PIECE_BYTES:
            return
        while self._queued and self._bytes + sum(n for _, n in self._queued) > QUEUED_BYTES:
            mx.eval(self._queued.popleft()[0])
        try:
            mx.async_eval(output)
        except ValueError:  # within transformations such as mx.compile there is nothing to queue
            return
        self._queued.append((output, self._bytes))
        self._bytes = 0
