"""Attention with a polynomial in place of exp equals exact attention."""

import math

import mlx.core as mx
import numpy as np
import pytest
from tolerances import relative_error

from mlx_mobileclip import layers
from mlx_mobileclip.errors import ModelError

pytestmark = pytest.mark.skipif(
    mx.default_device().type != mx.DeviceType.cpu, reason="tests implementations for the CPU"
)


def attend(qkv: mx.array, causal: bool = False, training: bool = False) -> mx.array:
    return layers.self_attention(qkv, causal=causal, training=training)


def exact_attention(qkv: mx.array, causal: bool = False) -> np.ndarray:
    """Attention in float64, head by head."""
    result = np.zeros((*qkv.shape[:2], qkv.shape[3], qkv.shape[4]))
    for b, head in np.ndindex(qkv.shape[0], qkv.shape[3]):
        queries, keys, values = np.array(qkv, np.float64)[b, :, :, head].transpose(1, 0, 2)
        scores = queries @ keys.T / math.sqrt(qkv.shape[4])
        if causal:
            scores[np.triu_indices_from(scores, 1)] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        result[b, :, head] = weights @ values / weights.sum(axis=1, keepdims=True)
    return result.reshape(*qkv.shape[:2], -1)


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("spread", [1, 5, 30])
def test_attention_from_products_is_exact(
    spread: float, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is about that of MLX, even with scores thousands apart."""
    qkv = spread * mx.random.normal((2, 256, 3, 2, 32))
    exact = exact_attention(qkv, causal)
    found = np.array(attend(qkv, causal))
    monkeypatch.setattr(layers, "on_cpu", lambda: False)
    plain = np.array(attend(qkv, causal))
    assert not np.array_equal(found, plain)
    assert relative_error(found, exact) < 3e-6 + 1.5 * relative_error(plain, exact)


@pytest.mark.parametrize("length", [1, 7, 256])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_attention_of_the_last_positions(
    causal: bool, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several query heads share a key head, and queries are those after a cached prefix."""
    queries, keys, values = (
        mx.random.normal((2, heads, positions, 64))
        for heads, positions in ((6, length), (2, 256), (2, 256))
    )
    found = np.array(layers.attention(queries, keys, values, 0.125, causal=causal, training=False))
    monkeypatch.setattr(layers, "on_cpu", lambda: False)
    plain = np.array(layers.attention(queries, keys, values, 0.125, causal=causal, training=False))
    assert not np.array_equal(found, plain)
    assert relative_error(found, plain) < 3e-6


def test_attention_propagates_non_finite_values() -> None:
    qkv = mx.random.normal((1, 256, 3, 1, 32))
    qkv[0, 7, 2, 0, 3] = math.nan
    assert not mx.isfinite(attend(qkv)).all().item()
    qkv[0, 7, 2, 0, 3] = 0
    qkv[0, 9, 0, 0, 3] = math.inf
    assert not mx.isfinite(attend(qkv)).all().item()


def test_heads_are_padded_on_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = mx.random.normal((2, 15, 3, 2, 32))
    shapes: list[tuple[int, ...]] = []
    fused = mx.fast.scaled_dot_product_attention

    def record_shape(
        queries: mx.array, *rest: mx.array, scale: float, mask: str | None
    ) -> mx.array:
        shapes.append(queries.shape)
        return fused(queries, *rest, scale=scale, mask=mask)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", record_shape)
    monkeypatch.setenv("MLX_MOBILECLIP_PAD_HEADS_FROM", "15")
    monkeypatch.setattr(layers, "on_cpu", lambda: False)
    attend(qkv)  # no padding on this device
    monkeypatch.setattr(layers, "on_metal", lambda: True)
    assert relative_error(np.array(attend(qkv)), exact_attention(qkv)) < 1e-6
    attend(qkv[:, :14])  # too few positions
    assert [shape[-1] for shape in shapes] == [32, 64, 32]
    monkeypatch.delenv("MLX_MOBILECLIP_PAD_HEADS_FROM")
    attend(mx.zeros((1, 511, 3, 1, 32)))
    attend(mx.zeros((1, 512, 3, 1, 32)))
    assert [shape[-1] for shape in shapes[3:]] == [32, 64]


@pytest.mark.parametrize("chosen", ["-1", "many", "9" * 5000])
def test_invalid_length_to_pad_from_is_refused(
    chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_MOBILECLIP_PAD_HEADS_FROM", chosen)
    monkeypatch.setattr(layers, "on_metal", lambda: True)
    with pytest.raises(ModelError, match=r"^MLX_MOBILECLIP_PAD_HEADS_FROM is '.{0,20}'; set it to"):
        attend(mx.zeros((1, 2, 3, 1, 32)))
