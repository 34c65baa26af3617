"""GELU and SwiGLU as polynomials equal the exact functions."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from tolerances import relative_error

from mlx_mobileclip import layers
from mlx_mobileclip.layers import GELU

pytestmark = pytest.mark.skipif(
    mx.default_device().type != mx.DeviceType.cpu, reason="tests implementations for the CPU"
)


gelu = GELU().eval()


def exact(x: np.ndarray) -> np.ndarray:
    """GELU in float64."""
    return np.array([v * 0.5 * math.erfc(-v / math.sqrt(2)) for v in x.astype(np.float64).flat])


def swiglu(gate_up: mx.array) -> mx.array:
    return layers.swiglu(gate_up, training=False)


def test_gelu_is_exact_to_a_millionth() -> None:
    x = np.linspace(-30, 30, 100_001, dtype=np.float32)
    assert np.abs(np.array(gelu(mx.array(x))) - exact(x)).max() < 1e-6


def test_gelu_of_large_values() -> None:
    x = np.array([-1e30, -1e8, -1e4, 1e4, 1e8, 1e30], np.float32)
    assert np.array_equal(np.array(gelu(mx.array(x))), np.maximum(x, 0))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_gelu_propagates_non_finite_values(value: float) -> None:
    assert not mx.isfinite(gelu(mx.array([value]))).item()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_gelu_in_half_precision_is_the_erf_form(dtype: mx.Dtype) -> None:
    x = mx.linspace(-8, 8, 1001).astype(dtype)
    assert gelu(x).dtype == dtype
    expected = exact(np.array(x.astype(mx.float32)))
    assert relative_error(np.array(gelu(x).astype(mx.float32)), expected) < 0.02


def test_gelu_adds_the_bias() -> None:
    x, bias = mx.random.normal((2, 3, 5, 8)), mx.random.normal((8,))
    assert mx.array_equal(gelu(x, bias), gelu(x + bias)).item()


def test_swiglu_is_exact_to_a_millionth(three_cores: list[mx.Stream]) -> None:
    x = np.linspace(-40, 40, 100_000, dtype=np.float32).reshape(1, 100, 1000)
    up = np.random.default_rng(0).normal(size=x.shape).astype(np.float32)
    expected = x.astype(np.float64) / (1 + np.exp(-x.astype(np.float64)))
    gate_up = mx.concatenate([mx.array(x), mx.ones(x.shape)], axis=-1)
    assert np.abs(np.array(swiglu(gate_up)) - expected).max() < 2e-6  # rounding of 40 is 1.9e-6
    near = np.abs(x) < 10
    assert np.abs(np.array(swiglu(gate_up)) - expected)[near].max() < 1e-6
    three_cores.clear()
    gate_up = mx.concatenate([mx.array(x), mx.array(up)], axis=-1)
    assert relative_error(np.array(swiglu(gate_up)), expected * up) < 1e-6
    assert len(three_cores) == 3


def test_swiglu_of_large_values() -> None:
    gate = [-1e30, -1e8, -1e4, 1e4, 1e8, 1e30]
    y = swiglu(mx.array([[gate + [1.0] * 6]]))
    assert np.array_equal(np.array(y)[0, 0], np.maximum(np.float32(gate), 0))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("index", [0, 1])
def test_swiglu_propagates_non_finite_values(index: int, value: float) -> None:
    gate_up = mx.ones((1, 1, 2))
    gate_up[0, 0, index] = value
    assert not mx.isfinite(swiglu(gate_up)).item()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_swiglu_in_half_precision_is_the_plain_form(dtype: mx.Dtype) -> None:
    gate_up = mx.random.normal((1, 3, 64)).astype(dtype)
    gate, up = mx.split(gate_up, 2, axis=-1)
    assert swiglu(gate_up).dtype == dtype
    plain, fast = ((x.astype(mx.float32)) for x in (nn.silu(gate) * up, swiglu(gate_up)))
    assert relative_error(np.array(fast), np.array(plain)) < 0.01
