"""Matrix products divided among cores, with float and with quantised weights.

Unnecessary once MLX's CPU backend calls BLAS on several threads, and dequantises a block of weights
once for all rows.
"""

from typing import Any

import mlx.core as mx

from .executor import LARGEST_PART, PARALLEL_FROM, on_all_cores

BLOCK_ROWS = (128, 64, 32)  # block sizes to try, in rows of weights
SMALL_PRODUCT = 1_000_000  # multiplications; below this OpenBLAS does not copy the operands
DEQUANTIZE_FROM = 6  # rows


def linear(x: mx.array, weight: mx.array, added: mx.array | None = None) -> mx.array:
    """Return x W^T + `added`, with the outputs divided among the cores.

    Args:
        x: (..., C).
        weight: (K, C).
        added: A bias (K,), or a residual (N, K) for an `x` of (N, C).

    Returns:
        (..., K).
    """
    outputs, inputs = weight.shape
    if x.ndim != 2:  # MLX spends time even on a no-op reshape
        y = linear(x.reshape(-1, inputs), weight, added)
        return y.reshape(*x.shape[:-1], outputs)
    max_rows = SMALL_PRODUCT // max(1, x.size)
    block = next((n for n in BLOCK_ROWS if n <= max_rows and outputs % n == 0), None)
    if block is None:
        return _in_stripes(x, weight, added)
    y = _in_blocks(x, weight, block)
    return y if added is None else y + added


def _in_blocks(x: mx.array, weight: mx.array, block: int) -> mx.array:
    """Return x W^T for few rows (N, C), where nearly all the time goes into reading the weights.

    OpenBLAS copies the weights before a product unless it is small. In small blocks, one row takes
    half the time, and 25 rows four fifths (AMD EPYC, two cores, MLX 0.32.4,
    OpenBLAS 0.3.21, 2026-11-25).
    """
    blocks = weight.reshape(-1, block, weight.shape[1]).swapaxes(1, 2)

    def work(start: int, stop: int) -> mx.array:
        return x[None] @ blocks[start:stop]

    y = on_all_cores(work, len(blocks), axis=0, work_size=min(weight.size, PARALLEL_FROM))
    return y.swapaxes(0, 1).reshape(len(x), len(weight))


def _in_stripes(x: mx.array, weight: mx.array, added: mx.array | None) -> mx.array:
    """Return x W^T + `added`, (N, C) to (N, K)."""

    def work(start: int, stop: int) -> mx.array:
        part = weight[start:stop].T
        if added is None:
            return x @ part
        if added.ndim == 1:  # addmm would broadcast it element by element
            return x @ part + added[start:stop]
        return mx.addmm(added[:, start:stop], x, part)

    # A product has many multiplications per output; 16 of them count as one element.
    work_size = min(x.size * len(weight) // 16, PARALLEL_FROM)
    return on_all_cores(work, len(weight), axis=-1, work_size=work_size)


def quantized_linear(
    x: mx.array, arrays: list[mx.array | None], quantization: dict[str, Any]
) -> mx.array:
    """Return x W^T for quantised weights.

    MLX's CPU backend dequantises the weights again for each row, and accumulates in the precision
    of the input. Dequantising once and leaving the product to BLAS takes a fortieth of the time for
    300 rows in float32 (AMD EPYC, two cores, MLX 0.32.4 with OpenBLAS, 2026-11-23), and has a
    thirtieth of the error in half precision.

    Args:
        x: (..., C).
        arrays: Weight, scales, and biases if the mode has them.
        quantization: `group_size`, `bits` and `mode`, as `mx.quantized_matmul` takes them.

    Returns:
        (..., K).
    """
    inputs, outputs = x.shape[-1], len(arrays[0])  # type: ignore[arg-type]
    few_rows = x.dtype == mx.float32 and x.size < DEQUANTIZE_FROM * inputs

    def work(start: int, stop: int) -> mx.array:
        part: list[Any] = [None if array is None else array[start:stop] for array in arrays]
        if few_rows:
            return mx.quantized_matmul(x, *part, **quantization)
        return x @ mx.dequantize(*part, **quantization).astype(x.dtype).T

    size = outputs * inputs
    work_size = min(size, LARGEST_PART) if few_rows else size
    return on_all_cores(work, outputs, axis=-1, work_size=work_size)
