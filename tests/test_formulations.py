"""What is computed otherwise on some device equals the plain formulation."""

import ctypes
import io
import math
import platform
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map
from tolerances import relative_error

from mlx_fastvlm.qwen2 import Embedding
from mlx_fastvlm.swiglu import swiglu
from mlx_mobileclip import attention, depthwise, device
from mlx_mobileclip.depthwise import Depthwise, DepthwiseDouble, Then, join
from mlx_mobileclip.errors import ModelError
from mlx_mobileclip.fastvit import PRESETS, FastViT, Stem
from mlx_mobileclip.gelu import bias_gelu, gelu
from mlx_mobileclip.linear import Linear, add_product
from mlx_mobileclip.quantization import MODES, Quantization
from mlx_mobileclip.transformer import TransformerLayer

pytestmark = pytest.mark.skipif(
    mx.default_device().type != mx.DeviceType.cpu, reason="the plain formulation runs on the CPU"
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """MLX's own seed is the time, and bounds are near what some draws reach."""
    mx.random.seed(0)


def graph_names(array: mx.array) -> list[str]:
    """The primitives that an array follows from."""
    listing = io.StringIO()
    mx.export_to_dot(listing, array)
    return re.findall(r'label ="(\w+)"', listing.getvalue())


def convolve(
    layer: Depthwise | DepthwiseDouble, x: mx.array, *beside: mx.array, **then: Then
) -> mx.array:
    """Undivided images, to the result in one piece."""
    return join(layer([x], *([array] for array in beside), **then))


def exact(x: np.ndarray) -> np.ndarray:
    return np.array([v * 0.5 * math.erfc(-v / math.sqrt(2)) for v in x.astype(np.float64).flat])


def test_gelu_is_exact_to_a_millionth() -> None:
    x = np.linspace(-30, 30, 100_001, dtype=np.float32)
    assert np.abs(np.array(gelu(mx.array(x))) - exact(x)).max() < 1e-6


def test_gelu_of_large_values() -> None:
    x = np.array([-1e30, -1e8, -1e4, 1e4, 1e8, 1e30], np.float32)
    assert np.array_equal(np.array(gelu(mx.array(x))), np.maximum(x, 0))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_gelu_hides_nothing_that_is_not_finite(value: float) -> None:
    assert not mx.isfinite(gelu(mx.array([value]))).item()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_gelu_in_half_precision_is_the_erf_form(dtype: mx.Dtype) -> None:
    x = mx.linspace(-8, 8, 1001).astype(dtype)
    assert gelu(x).dtype == dtype
    expected = exact(np.array(x.astype(mx.float32)))
    assert relative_error(np.array(gelu(x).astype(mx.float32)), expected) < 0.02


def test_bias_gelu() -> None:
    x, bias = mx.random.normal((2, 3, 5, 8)), mx.random.normal((8,))
    assert mx.array_equal(bias_gelu(x, bias), gelu(x + bias)).item()


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 8, 8), (3, 9, 13), (1, 31, 2), (1, 3, 127), (1, 2, 256)], ids=str
)
@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 1), (7, 1), (7, 2), (3, 2)])
@pytest.mark.parametrize("kind", [Depthwise, DepthwiseDouble])
def test_depthwise(
    kind: type[nn.Module], shape: tuple[int, int, int], kernel_size: int, stride: int
) -> None:
    layer = kind(6, kernel_size, stride)
    layer.update(tree_map(lambda w: mx.random.normal(w.shape), layer.parameters()))
    x = mx.random.normal((*shape, 6))
    layer.train()  # the plain convolution, which has a gradient
    plain = np.array(convolve(layer, x))
    layer.eval()
    assert relative_error(np.array(convolve(layer, x)), plain) < 1e-6


def test_depthwise_double_is_a_grouped_convolution() -> None:
    layer = DepthwiseDouble(6, 7, 2).eval()
    layer.even.weight, layer.odd.weight = mx.random.normal((2, 6, 7, 7, 1))
    weight = mx.stack([layer.even.weight, layer.odd.weight], axis=1).reshape(12, 7, 7, 1)
    x = mx.random.normal((2, 9, 13, 6))
    plain = mx.conv2d(x, weight, stride=2, padding=3, groups=6)
    assert relative_error(np.array(convolve(layer, x)), np.array(plain)) < 1e-6


@pytest.mark.parametrize(
    "shape", [(5, 6), (1, 6), (1, 1, 6), (2, 3, 6), (2, 3, 4, 6), (0, 6), (0, 2, 6)], ids=str
)
@pytest.mark.parametrize("outputs", [7, 192])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(shape: tuple[int, ...], outputs: int, bias: bool) -> None:
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
def test_packed_linear(mode: str, bias: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether divided or not, and whether the weights are unpacked first or not."""
    packing = asdict(Quantization.of(mode))
    layer, x = Linear(128, 37, bias=bias), mx.random.normal((2, rows, 128))
    packed, plain = layer.to_quantized(**packing), nn.Linear.to_quantized(layer, **packing)(x)
    assert relative_error(np.array(packed(x)), np.array(plain)) < 1e-6
    monkeypatch.setattr(device, "PARALLEL_FROM", 0)
    monkeypatch.setattr(device, "LARGEST_PART", 1000)
    assert relative_error(np.array(packed(x)), np.array(plain)) < 1e-6


@pytest.mark.parametrize(("dtype", "limit"), [(mx.bfloat16, 0.01), (mx.float16, 0.001)])
def test_packed_linear_in_half_precision(dtype: mx.Dtype, limit: float) -> None:
    """MLX's own has 30 times the error on the CPU."""
    layer, x = Linear(1024, 64), mx.random.normal((1, 1024)).astype(dtype)
    layer.set_dtype(dtype)
    packed = layer.to_quantized(group_size=64, bits=8)
    y = packed(x)
    assert y.dtype == dtype
    packed.set_dtype(mx.float32)
    expected = nn.QuantizedLinear.__call__(packed, x.astype(mx.float32))
    assert relative_error(np.array(y.astype(mx.float32)), np.array(expected)) < limit


@pytest.mark.parametrize("tokens", [1, 9])
def test_tied_output_layer(tokens: int) -> None:
    layer, x = Embedding(192, 64), mx.random.normal((1, tokens, 64))
    assert relative_error(np.array(layer.as_linear(x)), np.array(x @ layer.weight.T)) < 1e-6
    packed = layer.to_quantized(group_size=32, bits=8)
    expected = nn.QuantizedEmbedding.as_linear(packed, x)
    assert relative_error(np.array(packed.as_linear(x)), np.array(expected)) < 1e-6


@pytest.fixture
def three_cores(monkeypatch: pytest.MonkeyPatch) -> list[mx.Stream]:
    """Divide all work among three; returns the streams that parts are put on."""
    streams = [mx.new_stream(mx.cpu) for _ in range(3)]
    monkeypatch.setattr(device, "_streams", lambda: streams)
    monkeypatch.setattr(device, "cores", lambda: 3)
    monkeypatch.setattr(device, "PARALLEL_FROM", 0)
    started: list[mx.Stream] = []
    stream = mx.stream
    monkeypatch.setattr(mx, "stream", lambda s: started.append(s) or stream(s))
    return started


def test_a_part_is_divided_on_its_own_core(
    three_cores: list[mx.Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For memory; also after a part that failed."""
    monkeypatch.setattr(device, "LARGEST_PART", 30)

    def outer(start: int, stop: int) -> mx.array:
        if stop > 9:
            raise ValueError("no more")
        return device.on_all_cores(
            lambda i, j: mx.arange(start + i, start + j), stop - start, 0, 60
        )

    with pytest.raises(ValueError, match="no more"):
        device.on_all_cores(outer, 12, axis=0, makes=1)
    three_cores.clear()
    assert device.on_all_cores(outer, 9, axis=0, makes=1).tolist() == list(range(9))
    assert len(three_cores) == 9
    assert all(three_cores[i : i + 3] == [three_cores[i]] * 3 for i in (0, 3, 6))
    assert three_cores[0] != three_cores[3] != three_cores[6]


@pytest.mark.parametrize("residual", [True, False])
def test_linear_divided_among_cores(residual: bool, three_cores: list[mx.Stream]) -> None:
    layer, x = Linear(640, 70).eval(), mx.random.normal((50, 640))
    if residual:
        added = mx.random.normal((50, 70))
        found, expected = add_product(added, x, layer), added + x @ layer.weight.T
    else:
        found, expected = layer(x), x @ layer.weight.T + layer.bias
    assert relative_error(np.array(found), np.array(expected)) < 1e-6
    assert len(three_cores) == 3


@pytest.mark.parametrize("cores", [2, 5])
def test_work_divided_among_cores(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in parts that are not equal, and in no more than images, rows of tiles or heads."""
    layer = Depthwise(8, 7)
    layer.weight = mx.random.normal(layer.weight.shape)
    layer.eval()
    x, qkv = mx.random.normal((4, 9, 13, 8)), mx.random.normal((2, 256, 3, 3, 32))
    whole = convolve(layer, x), convolve(layer, x[:1]), attention.attend(qkv)
    mx.eval(whole)
    streams = [mx.new_stream(mx.cpu) for _ in range(cores)]
    monkeypatch.setattr(device, "_streams", lambda: streams)
    monkeypatch.setattr(device, "cores", lambda: cores)
    monkeypatch.setattr(device, "PARALLEL_FROM", 0)
    started: list[mx.Stream] = []
    stream = mx.stream
    monkeypatch.setattr(mx, "stream", lambda s: started.append(s) or stream(s))
    divided = convolve(layer, x), convolve(layer, x[:1]), attention.attend(qkv)
    assert all(mx.array_equal(a, b).item() for a, b in zip(divided, whole, strict=True))
    rows, positions = streams[:3], [streams[i % cores] for i in range(cores)]
    assert started == rows + rows + positions
    gradient = mx.grad(lambda x: (convolve(layer, x) ** 2).sum())(x)
    layer.train()
    plain = mx.grad(lambda x: (convolve(layer, x) ** 2).sum())(x)
    assert relative_error(gradient, plain) < 1e-5


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_freed_memory_is_kept() -> None:
    """What is computed again finds the pages that it had before."""
    work = (
        "import resource, mlx.core as mx; from mlx_mobileclip.device import keep_freed_memory\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    mx.eval(mx.ones(5_000_000) + mx.arange(5_000_000))\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "given_back = [faults(), faults()][1]; keep_freed_memory()\n"
        "print(given_back, [faults(), faults()][1])"
    )
    done = subprocess.run([sys.executable, "-c", work], capture_output=True, text=True, check=True)
    given_back, kept = map(int, done.stdout.split())
    assert kept < 100 < given_back


def test_work_divided_among_cores_in_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, each with streams of its own; one that has ended hands them on."""
    monkeypatch.setattr(device, "cores", lambda: 3)
    monkeypatch.setattr(device, "PARALLEL_FROM", 0)
    monkeypatch.setattr(device, "LARGEST_PART", 300)
    monkeypatch.setattr(device, "_thread", device._Thread())
    monkeypatch.setattr(device, "_handed_on", [])
    layer, x = Depthwise(8, 7).eval(), mx.random.normal((1, 9, 13, 8))
    layer.weight = mx.random.normal(layer.weight.shape)
    here = np.array(convolve(layer, x))
    streams: list[list[mx.Stream]] = []

    def compute(_: int) -> np.ndarray:
        result = np.array(convolve(layer, x))
        streams.append(device._streams()[1:])
        return result

    for _ in range(5):
        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(compute, range(20)))
            pool.submit(mx.clear_streams).result()
        assert all(np.array_equal(here, result) for result in results)
    assert all(len(others) == 2 for others in streams)
    assert sum(streams.index(others) == i for i, others in enumerate(streams)) <= 4


def test_openblas_is_told_to_leave_cores_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the first work that is divided, if the process has it."""
    told: list[int] = []
    monkeypatch.setattr(device, "_handed_on", [])
    for process in (SimpleNamespace(openblas_set_num_threads=told.append), SimpleNamespace()):
        monkeypatch.setattr(device, "_thread", device._Thread())
        monkeypatch.setattr(ctypes, "CDLL", lambda _, process=process: process)
        parts = [
            device.on_all_cores(lambda i, j: mx.zeros(j - i), 9, 0, makes) for makes in (9, 1 << 20)
        ]
        assert [part.size for part in parts] == [9, 9]
    assert told == [1]


@pytest.mark.parametrize("images", [1, 2, 7])
def test_layers_of_a_batch_divided_among_cores(
    images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several parts for a core, one after another."""
    layer = TransformerLayer(64, 2, 256, 1e-5).eval()
    x = mx.random.normal((images, 9, 64))
    whole = np.array(layer(x))
    monkeypatch.setattr(device, "cores", lambda: 2)
    monkeypatch.setattr(device, "PARALLEL_FROM", 0)
    monkeypatch.setattr(device, "LARGEST_PART", 500)
    sizes: list[int] = []

    def noting(x: mx.array) -> mx.array:
        sizes.append(len(x))
        return layer(x)

    divided = device.by_items(noting, x)
    assert graph_names(divided).count("Depends") == max(0, images - 2)
    assert relative_error(np.array(divided), whole) < 1e-6
    assert sizes == [1] * images
    gradients = [
        mx.grad(lambda x, f=f: f(x).sum())(x) for f in (layer, partial(device.by_items, layer))
    ]
    assert relative_error(np.array(gradients[1]), np.array(gradients[0])) < 1e-5


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("enough", [1, 10_000], ids=["fused", "apart"])
def test_what_follows_a_depthwise_convolution(
    enough: int, images: int, three_cores: list[mx.Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, ...]] = []
    monkeypatch.setattr(depthwise, "ENOUGH_POSITIONS", enough)
    layer = Depthwise(6, 3, 2).eval()
    layer.weight = mx.random.normal(layer.weight.shape)
    x, beside = mx.random.normal((images, 21, 13, 6)), mx.random.normal((images, 11, 7, 2))

    def then(y: mx.array, beside: mx.array) -> mx.array:
        calls.append(y.shape)
        return mx.concatenate([2 * y, beside], axis=-1)

    assert mx.array_equal(
        convolve(layer, x, beside, then=then), then(convolve(layer, x), beside)
    ).item()
    assert len(calls) - 1 == (3 if enough == 1 else 1)
    fused = convolve(layer, x, beside, then=then)
    layer.train()
    assert relative_error(np.array(convolve(layer, x, beside, then=then)), np.array(fused)) < 1e-6


@pytest.mark.parametrize("heights", [[9], [4, 5], [1, 7, 1], [2, 2, 2, 3]], ids=str)
@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 1), (7, 1), (7, 2), (3, 2)])
def test_strips_are_convolved_as_if_joined(
    kernel_size: int,
    stride: int,
    heights: list[int],
    three_cores: list[mx.Stream],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wherever they, and what stands beside them, are cut."""
    monkeypatch.setattr(depthwise, "ENOUGH_POSITIONS", 1)
    layer = Depthwise(6, kernel_size, stride).eval()
    layer.weight = mx.random.normal(layer.weight.shape)
    x = [mx.random.normal((2, height, 5, 6)) for height in heights]
    y = layer(x)
    assert len(y) == (-(-9 // stride) + 3) // 4
    assert mx.array_equal(join(y), convolve(layer, join(x))).item()
    plain = convolve(layer.train(), join(x))
    assert relative_error(np.array(join(y)), np.array(plain)) < 1e-6
    beside = [mx.random.normal(plain[:, rows].shape) for rows in (slice(2), slice(2, None))]
    product = layer.eval()(x, beside, then=mx.multiply)
    assert mx.array_equal(join(product), join(y) * join(beside)).item()
    gradients = mx.grad(lambda x: (join(layer(x)) ** 2).sum())(x)
    layer.train()
    plain_gradients = mx.grad(lambda x: (join(layer(x)) ** 2).sum())(x)
    assert relative_error(np.array(join(gradients)), np.array(join(plain_gradients))) < 1e-5
    layer.eval().set_dtype(mx.float16)
    half = layer([strip.astype(mx.float16) for strip in x])
    assert relative_error(np.array(join(half), np.float32), np.array(plain)) < 0.01


@pytest.mark.parametrize("images", [1, 2, 7])
def test_image_tower_divided_among_cores(
    images: int, three_cores: list[mx.Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In strips that stay apart from layer to layer; or by images, several parts for a core."""
    monkeypatch.setattr(depthwise, "ENOUGH_POSITIONS", 1)
    monkeypatch.setattr(device, "LARGEST_PART", 1 << 16)
    config = replace(PRESETS["mci0"], layers=(2, 2, 1, 1), embed_dims=(16, 32, 64, 128))
    tower = FastViT(config).eval()
    tower.update(tree_map(lambda w: 0.1 * mx.random.normal(w.shape), tower.parameters()))
    pixels = mx.random.uniform(shape=(images, 288, 160, 3))
    strips = [pixels]
    for layer in (tower.stem, *tower.stages[:2]):
        strips = layer(strips)
        assert len(strips) >= 3
    divided = tower(pixels)
    assert len(set(map(str, three_cores))) == 3
    assert ("Depends" in graph_names(divided)) == (images == 7)
    monkeypatch.setattr(device, "PARALLEL_FROM", 1 << 60)
    assert relative_error(np.array(divided), np.array(tower(pixels))) < 1e-5


@pytest.mark.parametrize("side", [(1, 1), (5, 8), (9, 33)], ids=str)
def test_stem_divided_among_cores(side: tuple[int, int], three_cores: list[mx.Stream]) -> None:
    stem = Stem(16).eval()
    stem.update(tree_map(lambda w: mx.random.normal(w.shape), stem.parameters()))
    pixels = mx.random.normal((2, *side, 3))
    found = np.array(join(stem([pixels])))
    assert three_cores
    plain = bias_gelu(stem.conv(pixels), stem.conv_bias)
    plain = bias_gelu(convolve(stem.depthwise, plain), stem.depthwise_bias)
    plain = gelu(stem.pointwise(plain))
    assert relative_error(found, np.array(plain)) < 1e-6


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
@pytest.mark.parametrize("place", [0, 1])
def test_swiglu_hides_nothing_that_is_not_finite(place: int, value: float) -> None:
    gate_up = mx.ones((1, 1, 2))
    gate_up[0, 0, place] = value
    assert not mx.isfinite(swiglu(gate_up)).item()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_swiglu_in_half_precision_is_the_plain_form(dtype: mx.Dtype) -> None:
    gate_up = mx.random.normal((1, 3, 64)).astype(dtype)
    gate, up = mx.split(gate_up, 2, axis=-1)
    assert swiglu(gate_up).dtype == dtype
    plain, fast = ((x.astype(mx.float32)) for x in (nn.silu(gate) * up, swiglu(gate_up)))
    assert relative_error(np.array(fast), np.array(plain)) < 0.01


def test_depthwise_notices_another_kernel() -> None:
    layer = Depthwise(6, 3)
    layer.eval()
    x = mx.random.normal((1, 5, 5, 6))
    assert not convolve(layer, x).any().item()
    layer.weight = mx.ones(layer.weight.shape)
    assert convolve(layer, x).any().item()


def test_depthwise_has_the_gradient_of_the_plain_convolution() -> None:
    layer = Depthwise(6, 7, 2)
    kernel, x = mx.random.normal(layer.weight.shape), mx.random.normal((1, 9, 8, 6))

    def loss(kernel: mx.array, x: mx.array) -> mx.array:
        layer.weight = kernel
        return (convolve(layer, x) ** 2).sum()

    layer.train()
    plain = mx.grad(loss, argnums=(0, 1))(kernel, x)
    layer.eval()
    for value, reference in zip(mx.grad(loss, argnums=(0, 1))(kernel, x), plain, strict=True):
        assert relative_error(np.array(value), np.array(reference)) < 1e-5
    compiled = mx.compile(loss)(kernel, x)
    assert relative_error(np.array(compiled), np.array(loss(kernel, x))) < 1e-6


def test_depthwise_keeps_its_banded_matrix_out_of_the_parameters() -> None:
    layer = Depthwise(6, 3)
    layer.eval()
    mx.eval(convolve(layer, mx.zeros((1, 5, 5, 6))))
    assert list(layer.parameters()) == ["weight"]


def attended(qkv: mx.array, causal: bool = False) -> np.ndarray:
    """In float64, one head after another."""
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
def test_attention_in_products(
    spread: float, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No less exact than MLX's own, also with scores up to thousands apart."""
    qkv = spread * mx.random.normal((2, 256, 3, 2, 32))
    exact = attended(qkv, causal)
    found = np.array(attention.attend(qkv, causal))
    monkeypatch.setattr(attention, "on_cpu", lambda: False)
    plain = np.array(attention.attend(qkv, causal))
    assert not np.array_equal(found, plain)
    assert relative_error(found, exact) < 3e-6 + 1.5 * relative_error(plain, exact)


@pytest.mark.parametrize("length", [1, 7, 256])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_attention_of_the_last_positions(
    causal: bool, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several heads of queries to one of keys, as after a prompt of which the beginning is
    known."""
    queries, keys, values = (
        mx.random.normal((2, heads, positions, 64))
        for heads, positions in ((6, length), (2, 256), (2, 256))
    )
    found = np.array(attention.attend_to(queries, keys, values, 0.125, causal))
    monkeypatch.setattr(attention, "on_cpu", lambda: False)
    plain = np.array(attention.attend_to(queries, keys, values, 0.125, causal))
    assert not np.array_equal(found, plain)
    assert relative_error(found, plain) < 3e-6


def test_attention_hides_nothing_that_is_not_finite() -> None:
    qkv = mx.random.normal((1, 256, 3, 1, 32))
    qkv[0, 7, 2, 0, 3] = math.nan
    assert not mx.isfinite(attention.attend(qkv)).all().item()
    qkv[0, 7, 2, 0, 3] = 0
    qkv[0, 9, 0, 0, 3] = math.inf
    assert not mx.isfinite(attention.attend(qkv)).all().item()


def test_attention_with_heads_padded_as_for_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = mx.random.normal((2, 15, 3, 2, 32))
    shapes: list[tuple[int, ...]] = []
    attend = mx.fast.scaled_dot_product_attention

    def noting(queries: mx.array, *rest: mx.array, scale: float, mask: str | None) -> mx.array:
        shapes.append(queries.shape)
        return attend(queries, *rest, scale=scale, mask=mask)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", noting)
    monkeypatch.setenv("MLX_MOBILECLIP_PAD_HEADS_FROM", "15")
    monkeypatch.setattr(attention, "on_cpu", lambda: False)
    attention.attend(qkv)  # not on this device
    monkeypatch.setattr(attention, "on_metal", lambda: True)
    assert relative_error(np.array(attention.attend(qkv)), attended(qkv)) < 1e-6
    attention.attend(qkv[:, :14])  # too few positions
    assert [shape[-1] for shape in shapes] == [32, 64, 32]
    monkeypatch.delenv("MLX_MOBILECLIP_PAD_HEADS_FROM")
    attention.attend(mx.zeros((1, 511, 3, 1, 32)))
    attention.attend(mx.zeros((1, 512, 3, 1, 32)))
    assert [shape[-1] for shape in shapes[3:]] == [32, 64]


@pytest.mark.parametrize("chosen", ["-1", "many", "9" * 5000])
def test_a_length_to_pad_from_that_is_no_number(
    chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_MOBILECLIP_PAD_HEADS_FROM", chosen)
    monkeypatch.setattr(attention, "on_metal", lambda: True)
    with pytest.raises(ModelError, match=r"^MLX_MOBILECLIP_PAD_HEADS_FROM is '.{0,20}'; set it to"):
        attention.attend(mx.zeros((1, 2, 3, 1, 32)))
