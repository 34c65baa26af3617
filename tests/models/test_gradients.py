"""Training mode uses plain MLX operations on every device, with exact gradients."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import synthetic
from mlx.utils import tree_flatten, tree_map
from synthetic_clip import tiny_config
from tolerances import relative_error

from mlx_fastvlm import load
from mlx_mobileclip import MobileCLIP, layers


@pytest.fixture(autouse=True)
def seeded() -> None:
    mx.random.seed(0)


@pytest.mark.parametrize("length", [1, 7, 64])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_attention_gradient_equals_mlx(causal: bool, length: int) -> None:
    queries, keys, values = (
        mx.random.normal((2, heads, positions, 32))
        for heads, positions in ((6, length), (2, 64), (2, 64))
    )

    def ours(*qkv: mx.array) -> mx.array:
        return (layers.attention(*qkv, 0.2, causal=causal, training=True) ** 2).sum()

    def reference(*qkv: mx.array) -> mx.array:
        mask = "causal" if causal else None
        return (mx.fast.scaled_dot_product_attention(*qkv, scale=0.2, mask=mask) ** 2).sum()

    found = mx.grad(ours, argnums=(0, 1, 2))(queries, keys, values)
    expected = mx.grad(reference, argnums=(0, 1, 2))(queries, keys, values)
    for a, b in zip(found, expected, strict=True):
        assert mx.isfinite(a).all().item()
        assert relative_error(np.array(a), np.array(b)) < 1e-6


def gradients(model: nn.Module, loss: Callable[[Any], mx.array]) -> dict[str, np.ndarray]:
    """Gradients of a model in training mode, by the names of its parameters."""
    model.train()
    found = dict(tree_flatten(nn.value_and_grad(model, loss)(model)[1]))
    assert all(mx.isfinite(gradient).all().item() for gradient in found.values())
    return {name: np.array(gradient) for name, gradient in found.items()}


def assert_plain_gradients(
    model: nn.Module, loss: Callable[[Any], mx.array], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Assert that the gradients equal those of the plain forms."""
    found = gradients(model, loss)
    assert sum(bool(gradient.any()) for gradient in found.values()) > len(found) / 2
    monkeypatch.setattr(layers, "on_cpu", lambda: False)
    expected = gradients(model, loss)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        if expected[name].any():
            assert relative_error(gradient, expected[name]) < 1e-5, name
        else:
            assert not gradient.any(), name


@pytest.mark.parametrize("variant", ["MobileCLIP-S0", "MobileCLIP2-S3", "MobileCLIP-B"])
def test_mobileclip_gradients(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FastViT with both kinds of normalisation, ViT, causal and hybrid text towers."""
    config = tiny_config(variant)
    model = MobileCLIP(config)
    model.update(tree_map(lambda w: 0.1 * mx.random.normal(w.shape), model.parameters()))
    size = config.preprocess.image_size
    pixels = mx.random.uniform(shape=(3, size, size, 3))
    assert config.text is not None
    shape = (3, config.text.context_length)
    ids = mx.random.randint(1, config.text.vocab_size, shape)

    def loss(model: MobileCLIP) -> mx.array:
        images, texts = model.encode_image(pixels), model.text(ids)
        return mx.exp(model.logit_scale) * (images * texts).sum() + (images**2).sum()

    assert_plain_gradients(model, loss, monkeypatch)


def test_fastvlm_gradients(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = load(synthetic.write_layout(tmp_path, "llava_qwen2"))
    inputs = processor("the", np.full((20, 30, 3), 90, np.uint8))

    def loss(model: Any) -> mx.array:
        logits = model(inputs.input_ids[None], pixels=inputs.pixels)
        return nn.losses.cross_entropy(logits[0, :-1], mx.maximum(inputs.input_ids[1:], 0)).mean()

    assert_plain_gradients(model, loss, monkeypatch)
