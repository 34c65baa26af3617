"""The depthwise kernel against MLX's convolution: compiled as C++, and on a GPU."""

import mlx.core as mx
import numpy as np
import pytest
from cpp_kernel import FORMS, CppKernel
from tolerances import relative_error

from mlx_mobileclip.device import backend
from mlx_mobileclip.errors import ModelError
from mlx_mobileclip.gpu import depthwise

# Odd sizes, partial strips, maps smaller than the kernel, several images.
SHAPES = [(2, 9, 13, 8), (1, 1, 1, 8), (1, 16, 17, 12), (3, 5, 2, 24)]
HALF = {mx.float16: 2**-11, mx.bfloat16: 2**-8}  # relative error of one rounding


@pytest.fixture(scope="module")
def cpp_kernel(tmp_path_factory: pytest.TempPathFactory) -> CppKernel:
    return CppKernel(tmp_path_factory.mktemp("kernel"))


def check(form: tuple[int, ...], shape: tuple[int, ...], dtype: mx.Dtype, bound: float) -> None:
    """Compare the kernel with a float32 grouped convolution of the same values."""
    size, stride, outputs, count = form
    channels = shape[-1]
    rng = np.random.default_rng(0)

    def random(*shape: int) -> mx.array:
        return mx.array(rng.standard_normal(shape, np.float32)).astype(dtype)

    x = random(*shape)
    biases = random(count, outputs * channels).astype(mx.float32)
    kernels = [random(channels, size, size, 1) for _ in range(outputs)]
    assert depthwise.supports(x, kernels[0], outputs)
    found = depthwise.depthwise_conv(x, depthwise.arranged(kernels), biases, stride)
    assert found.dtype == dtype
    weight = mx.stack(kernels, axis=1).reshape(-1, size, size, 1).astype(mx.float32)
    with mx.stream(mx.cpu):
        plain = mx.conv2d(x.astype(mx.float32), weight, stride, size // 2, groups=channels)
        expected = plain + biases[:, None, None, None]
    assert relative_error(np.array(found.astype(mx.float32)), np.array(expected)) < bound


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_source_computes_a_convolution(
    cpp_kernel: CppKernel,
    monkeypatch: pytest.MonkeyPatch,
    form: tuple[int, ...],
    shape: tuple[int, ...],
) -> None:
    monkeypatch.setattr(depthwise, "_kernel", lambda _: cpp_kernel)
    check(form, shape, mx.float32, 1e-6)
    check(form, shape, mx.float16, HALF[mx.float16])


@pytest.mark.skipif(backend() == "cpu", reason="the kernel needs an Apple or NVIDIA GPU")
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 64, 64, 96)], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_kernel_on_a_gpu(form: tuple[int, ...], shape: tuple[int, ...], dtype: mx.Dtype) -> None:
    check(form, shape, dtype, HALF.get(dtype, 1e-6))


def test_unsupported_inputs() -> None:
    weight = mx.zeros((6, 3, 3, 1))
    assert not depthwise.supports(mx.zeros((1, 4, 4, 6)), weight, 1)  # not a multiple of 4
    assert depthwise.supports(mx.zeros((1, 4, 4, 6)), weight, 2)
    assert not depthwise.supports(mx.zeros((1, 4, 4, 6), mx.float16), weight, 2)
    assert not depthwise.supports(mx.zeros((1, 1, 1, 4)), mx.zeros((4, 3, 3, 1)), 1)
    huge = mx.broadcast_to(mx.zeros(()), (1 << 10, 1 << 9, 1 << 9, 8))
    assert not depthwise.supports(huge, mx.zeros((8, 3, 3, 1)), 1)


def test_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(depthwise.SWITCH, raising=False)
    monkeypatch.setattr(depthwise, "backend", lambda: "metal")
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "Apple M9"})
    assert not depthwise.use_own()
    monkeypatch.setattr(depthwise, "FASTER_ON", frozenset({"Apple M9"}))
    assert depthwise.use_own()
    monkeypatch.setenv(depthwise.SWITCH, "mlx")
    assert not depthwise.use_own()
    monkeypatch.setenv(depthwise.SWITCH, "own")
    assert depthwise.use_own()
    monkeypatch.setattr(depthwise, "backend", lambda: "cpu")
    assert not depthwise.use_own()
    monkeypatch.setenv(depthwise.SWITCH, "fast\n")
    with pytest.raises(ModelError, match=r"^MLX_MOBILECLIP_DEPTHWISE is 'fast\\n'; set it to mlx"):
        depthwise.use_own()
