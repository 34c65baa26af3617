"""Depthwise convolution as matrix products equals the plain one."""

from dataclasses import replace
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from cores import graph_names
from mlx.utils import tree_map
from tolerances import relative_error

from mlx_mobileclip.cpu import depthwise, executor
from mlx_mobileclip.cpu.rows import Rows, join, whole
from mlx_mobileclip.layers import (
    GELU,
    DepthwiseConv,
    DepthwiseConvDouble,
    Linear,
    add_biases,
    add_product,
)
from mlx_mobileclip.models.fastvit import PRESETS, FastViT, Stem

pytestmark = pytest.mark.skipif(
    mx.default_device().type != mx.DeviceType.cpu, reason="tests implementations for the CPU"
)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 8, 8), (3, 9, 13), (1, 31, 2), (1, 3, 127), (1, 2, 256)], ids=str
)
@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 1), (7, 1), (7, 2), (3, 2)])
@pytest.mark.parametrize("kind", [DepthwiseConv, DepthwiseConvDouble])
def test_depthwise_equals_the_plain_convolution(
    kind: type[nn.Module], shape: tuple[int, int, int], kernel_size: int, stride: int
) -> None:
    layer = kind(6, kernel_size, stride)
    layer.update(tree_map(lambda w: mx.random.normal(w.shape), layer.parameters()))
    x = mx.random.normal((*shape, 6))
    layer.train()  # the plain convolution, which has a gradient
    plain = np.array(whole(layer(x)))
    layer.eval()
    assert relative_error(np.array(whole(layer(x))), plain) < 1e-6


def test_depthwise_double_is_a_grouped_convolution() -> None:
    layer = DepthwiseConvDouble(6, 7, 2).eval()
    layer.even.weight, layer.odd.weight = mx.random.normal((2, 6, 7, 7, 1))
    weight = mx.stack([layer.even.weight, layer.odd.weight], axis=1).reshape(12, 7, 7, 1)
    x = mx.random.normal((2, 9, 13, 6))
    plain = mx.conv2d(x, weight, stride=2, padding=3, groups=6)
    assert relative_error(np.array(whole(layer(x))), np.array(plain)) < 1e-6


@pytest.mark.parametrize("heights", [[9], [4, 5], [1, 7, 1], [2, 2, 2, 3]], ids=str)
@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 1), (7, 1), (7, 2), (3, 2)])
def test_strips_are_convolved_as_if_joined(
    kernel_size: int,
    stride: int,
    heights: list[int],
    three_cores: list[mx.Stream],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wherever the rows are cut."""
    monkeypatch.setattr(depthwise, "MIN_POSITIONS", 1)
    layer = DepthwiseConv(6, kernel_size, stride).eval()
    layer.weight = mx.random.normal(layer.weight.shape)
    strips = [mx.random.normal((2, height, 5, 6)) for height in heights]
    x = Rows(strips)
    y = layer(x)
    assert isinstance(y, Rows) == (-(-9 // stride) > 4)
    assert y.shape == (2, -(-9 // stride), -(-5 // stride), 6)
    assert mx.array_equal(whole(y), whole(layer(join(strips)))).item()
    plain = layer.train()(join(strips))
    assert relative_error(np.array(whole(y)), np.array(plain)) < 1e-6

    def loss(strips: list[mx.array]) -> mx.array:
        return (whole(layer(Rows(strips))) ** 2).sum()

    plain_gradients = mx.grad(loss)(strips)
    layer.eval()
    gradients = mx.grad(loss)(strips)
    assert relative_error(np.array(join(gradients)), np.array(join(plain_gradients))) < 1e-5
    layer.set_dtype(mx.float16)
    half = whole(layer(Rows([strip.astype(mx.float16) for strip in strips])))
    assert relative_error(np.array(half, np.float32), np.array(plain)) < 0.01


@pytest.mark.parametrize("heights", [[11], [4, 4, 3], [5, 6]], ids=str)
def test_elementwise_functions_work_strip_by_strip(
    heights: list[int], three_cores: list[mx.Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the cores of the strips, also if other arguments are cut differently."""
    monkeypatch.setattr(depthwise, "MIN_POSITIONS", 1)
    layer, linear = DepthwiseConv(6, 3).eval(), Linear(6, 6).eval()
    layer.weight = mx.random.normal(layer.weight.shape)
    x, bias = mx.random.normal((2, 11, 7, 6)), mx.random.normal((6,))
    residual = mx.random.normal(x.shape)
    tops = [sum(heights[:i]) for i in range(len(heights) + 1)]
    cut = Rows([residual[:, top:bottom] for top, bottom in pairwise(tops)])
    y = layer(x)
    assert isinstance(y, Rows) and y.heights == [4, 4, 3]
    three_cores.clear()
    found = add_product(cut, GELU().eval()(y, bias), linear)
    assert isinstance(found, Rows) and found.heights == heights
    assert len(set(map(str, three_cores))) == 3
    expected = add_product(residual, GELU().eval()(whole(y), bias), linear)
    assert relative_error(np.array(whole(found)), np.array(expected)) < 1e-6
    layer.bias = bias
    first, second = add_biases(y, layer, 2 * bias)
    assert mx.array_equal(whole(second), whole(y) + bias + 2 * bias).item()
    assert mx.array_equal(whole(first + residual), whole(y) + bias + residual).item()


@pytest.mark.parametrize("images", [1, 2, 7])
def test_image_tower_divided_among_cores_is_the_same(
    images: int, three_cores: list[mx.Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work is divided into strips of rows, or by images with several parts per core."""
    monkeypatch.setattr(depthwise, "MIN_POSITIONS", 1)
    monkeypatch.setattr(executor, "LARGEST_PART", 1 << 16)
    config = replace(PRESETS["mci0"], layers=(2, 2, 1, 1), embed_dims=(16, 32, 64, 128))
    tower = FastViT(config).eval()
    tower.update(tree_map(lambda w: 0.1 * mx.random.normal(w.shape), tower.parameters()))
    pixels = mx.random.uniform(shape=(images, 288, 160, 3))
    x = pixels
    for layer in (tower.stem, *tower.stages[:2]):
        x = layer(x)
        assert isinstance(x, Rows) and len(x.strips) >= 3
    divided = tower(pixels)
    assert len(set(map(str, three_cores))) == 3
    assert ("Depends" in graph_names(divided)) == (images == 7)
    monkeypatch.setattr(executor, "PARALLEL_FROM", 1 << 60)
    assert relative_error(np.array(divided), np.array(tower(pixels))) < 1e-5


@pytest.mark.parametrize("side", [(1, 1), (5, 8), (9, 33)], ids=str)
def test_stem_divided_among_cores_is_the_same(
    side: tuple[int, int], three_cores: list[mx.Stream]
) -> None:
    stem = Stem(16).eval()
    stem.update(tree_map(lambda w: mx.random.normal(w.shape), stem.parameters()))
    pixels = mx.random.normal((2, *side, 3))
    found = np.array(whole(stem(pixels)))
    assert three_cores
    plain = stem.train()(pixels)
    assert relative_error(found, np.array(plain)) < 2e-6


def test_depthwise_detects_a_changed_kernel() -> None:
    layer = DepthwiseConv(6, 3)
    layer.eval()
    x = mx.random.normal((1, 5, 5, 6))
    assert not whole(layer(x)).any().item()
    layer.weight = mx.ones(layer.weight.shape)
    assert whole(layer(x)).any().item()


def test_depthwise_gradient_equals_the_plain_convolution() -> None:
    layer = DepthwiseConv(6, 7, 2)
    kernel, x = mx.random.normal(layer.weight.shape), mx.random.normal((1, 9, 8, 6))

    def loss(kernel: mx.array, x: mx.array) -> mx.array:
        layer.weight = kernel
        return (whole(layer(x)) ** 2).sum()

    layer.train()
    plain = mx.grad(loss, argnums=(0, 1))(kernel, x)
    layer.eval()
    for value, reference in zip(mx.grad(loss, argnums=(0, 1))(kernel, x), plain, strict=True):
        assert relative_error(np.array(value), np.array(reference)) < 1e-5
    compiled = mx.compile(loss)(kernel, x)
    assert relative_error(np.array(compiled), np.array(loss(kernel, x))) < 1e-6


def test_depthwise_keeps_its_banded_matrix_out_of_the_parameters() -> None:
    layer = DepthwiseConv(6, 3)
    layer.eval()
    mx.eval(layer(mx.zeros((1, 5, 5, 6))))
    assert list(layer.parameters()) == ["weight"]
