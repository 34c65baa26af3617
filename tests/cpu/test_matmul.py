"""Products divided among cores, with float and quantised weights, equal plain ones."""

from dataclasses import asdict

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from tolerances import relative_error

from mlx_mobileclip.cpu import executor
from mlx_mobileclip.layers import Embedding, Linear, add_product
from mlx_mobileclip.quantization import MODES, Quantization

pytestmark = pytest.mark.skipif(
    mx.default_device().type != mx.DeviceType.cpu, reason="tests implementations for the CPU"
)


@pytest.mark.parametrize(
    "shape", [(5, 6), (1, 6), (1, 1, 6), (2, 3, 6), (2, 3, 4, 6), (0, 6), (0, 2, 6)], ids=str
)
@pytest.mark.parametrize("outputs", [7, 192])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_mlx(shape: tuple[int, ...], outputs: int, bias: bool) -> None:
    layer, x = Linear(6, outputs, bias=bias).eval(), mx.random.normal(shape)
    plain = nn.Linear(6, outputs, bias=bias)
    plain.update(layer.parameters())
    assert layer(x).shape == plain(x).shape
    assert mx.allclose(layer(x), plain(x), rtol=1e-6, atol=1e-6).item()
    gradients = [nn.value_and_grad(m, lambda m=m: m(x).sum())()[1] for m in (layer, plain)]
    assert all(mx.allclose(gradients[0][name], gradients[1][name]).item() for name in gradients[1])


@pytest.mark.parametrize("rows", [1, 3, 50])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_quantized_linear_equals_mlx(
    mode: str, bias: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Divided or not, and with weights dequantised first or not."""
    options = asdict(Quantization.of(mode))
    layer, x = Linear(128, 37, bias=bias), mx.random.normal((2, rows, 128))
    quantized = layer.to_quantized(**options).eval()
    plain = nn.Linear.to_quantized(layer, **options)(x)
    assert relative_error(np.array(quantized(x)), np.array(plain)) < 1e-6
    monkeypatch.setattr(executor, "PARALLEL_FROM", 0)
    monkeypatch.setattr(executor, "LARGEST_PART", 1000)
    assert relative_error(np.array(quantized(x)), np.array(plain)) < 1e-6


@pytest.mark.parametrize(("dtype", "limit"), [(mx.bfloat16, 0.01), (mx.float16, 0.001)])
def test_quantized_linear_in_half_precision(dtype: mx.Dtype, limit: float) -> None:
    """MLX's own has 30 times the error on the CPU."""
    layer, x = Linear(1024, 64), mx.random.normal((1, 1024)).astype(dtype)
    layer.set_dtype(dtype)
    quantized = layer.to_quantized(group_size=64, bits=8).eval()
    y = quantized(x)
    assert y.dtype == dtype
    quantized.set_dtype(mx.float32)
    expected = nn.QuantizedLinear.__call__(quantized, x.astype(mx.float32))
    assert relative_error(np.array(y.astype(mx.float32)), np.array(expected)) < limit


@pytest.mark.parametrize("tokens", [1, 9])
def test_tied_output_layer_equals_mlx(tokens: int) -> None:
    layer, x = Embedding(192, 64).eval(), mx.random.normal((1, tokens, 64))
    assert relative_error(np.array(layer.as_linear(x)), np.array(x @ layer.weight.T)) < 1e-6
    quantized = layer.to_quantized(group_size=32, bits=8).eval()
    expected = nn.QuantizedEmbedding.as_linear(quantized, x)
    assert relative_error(np.array(quantized.as_linear(x)), np.array(expected)) < 1e-6


@pytest.mark.parametrize("residual", [True, False])
def test_linear_divided_among_cores_is_the_same(
    residual: bool, three_cores: list[mx.Stream]
) -> None:
    layer, x = Linear(640, 70).eval(), mx.random.normal((50, 640))
    if residual:
        added = mx.random.normal((50, 70))
        found, expected = add_product(added, x, layer), added + x @ layer.weight.T
    else:
        found, expected = layer(x), x @ layer.weight.T + layer.bias
    assert relative_error(np.array(found), np.array(expected)) < 1e-6
    assert len(three_cores) == 3
