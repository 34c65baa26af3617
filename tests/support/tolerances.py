"""Numeric tolerances of the tests, with their reasons.

Differences are relative to the largest magnitude of the reference tensor.
"""

from typing import Any

import numpy as np

STAGE_FLOAT32 = 1e-4  # requirement: float32 against PyTorch, per stage, at full size
FOLD_FLOAT32 = 2e-5  # folding in float64 against running the unfolded branches in float32
# The number of rows and the position of a row decide with which kernel OpenBLAS multiplies, and so
# the order of sums: a difference of about 2^-24 sqrt(n) for a sum of n products, 1.3e-6 for the
# longest sums of the tiny models (512). The largest measured is 1.3e-6.
BATCHED = 1e-5  # a row or image of a batch against the same alone or at another index
REUSED = 1e-5  # a prompt in two passes against one
SAME_WEIGHTS = 1e-6  # same canonical weights, another computation; the order of sums may differ
FLOAT16 = 2e-2  # tiny models: 11-bit products through 30 layers
BFLOAT16 = 1e-1  # as above with 8 bits
HALF_PRECISION_COSINE = 0.999  # requirement: embeddings in float16 against float32
KV_8BIT = 2e-2  # keys and values rounded to 8 bits in groups of 32


def relative_error(value: Any, reference: Any) -> float:
    """Largest absolute difference divided by the largest magnitude of the reference."""
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    assert value.shape == reference.shape, (value.shape, reference.shape)
    assert np.isfinite(value).all()
    return float(np.abs(value - reference).max() / np.abs(reference).max())
