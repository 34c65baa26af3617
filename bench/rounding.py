"""Emulate the rounding of image towers on an Apple GPU: `python -m bench.rounding`.

The tower runs in half precision through the GPU code paths, on a CPU. Differences of GPU kernels
are emulated: matrix products and attention accumulate in float32 and round once, and MLX's
depthwise kernel rounds each product before adding it (MLX 0.32.4
mlx/backend/metal/kernels/conv.metal). The first row is this package before 2026-11-27, when GELU
and the biases rounded after each operation.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

import mlx_fastvlm
from mlx_mobileclip import layers
from mlx_mobileclip.checkpoints.weights import named_parameters
from mlx_mobileclip.cpu import depthwise as cpu_depthwise
from mlx_mobileclip.cpu.rows import whole
from mlx_mobileclip.device import dtype_name
from mlx_mobileclip.gpu import depthwise, elementwise
from mlx_mobileclip.models import fastvit
from mlx_mobileclip.models.fastvit import PRESETS, FastViT

from .inputs import pixels
from .record import table

DTYPES = (mx.float16, mx.bfloat16)
VERSIONS = ("before", "now", "now, own depthwise kernel")
Function = Callable[..., Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tower", choices=(*PRESETS, "demo"), default="fastvithd")
    parser.add_argument("--resolution", type=int, default=256, metavar="R")
    parser.add_argument("--images", type=int, default=1, metavar="N")
    args = parser.parse_args()
    tower = demo_tower() if args.tower == "demo" else random_tower(args.tower)
    x = mx.array(pixels(0, (args.images, args.resolution, args.resolution, 3)))
    rows = []
    for dtype in DTYPES:
        errors = {version: error(tower, x, dtype, version) for version in VERSIONS}
        before = errors["before"]
        rows += [
            (dtype_name(dtype), version, f"{value:.2e}", f"{value / before:.2f}")
            for version, value in errors.items()
        ]
    print(table(("dtype", "version", "relative error", "of before"), rows))


def demo_tower() -> FastViT:
    """The trained tower of the demo FastVLM, float32."""
    return mlx_fastvlm.load("demo", dtype="float32")[0].vision_tower


def random_tower(name: str, seed: int = 0) -> FastViT:
    """A tower with random float32 weights, scaled so that feature maps neither grow nor shrink."""
    tower, rng, weights = FastViT(PRESETS[name]), np.random.default_rng(seed), []
    for path, value in named_parameters(tower).items():
        noise = rng.standard_normal(value.shape, np.float32)
        if path.endswith("bias"):
            noise *= 0.1
        elif value.ndim == 1:  # LayerNorm scale
            noise = 1 + 0.1 * noise
        else:
            noise *= np.float32(np.prod(value.shape[1:])) ** -0.5
        if "token_mixer.conv" in path or ("pos_emb" in path and value.ndim == 4):
            noise *= 0.3
            noise[:, value.shape[1] // 2, value.shape[2] // 2] += 1  # the folded residual
        elif path.endswith(("fc2.weight", "proj.weight")):
            noise *= 0.3  # the folded layer scale
        weights.append((path, mx.array(noise)))
    tower.load_weights(weights)
    return tower.eval()


def error(tower: FastViT, x: mx.array, dtype: mx.Dtype, version: str) -> float:
    """Error of a version in half precision, relative to float32 with the same rounded weights.

    Args:
        tower: A float32 tower.
        x: (N, S, S, 3) pixels.
        dtype: dtype of the computation.
        version: One of VERSIONS.

    Returns:
        The root mean square over the images of norm(a - b) / norm(a).
    """
    weights = tower.parameters()
    rounded = tree_map(lambda weight: weight.astype(dtype), weights)
    x = x.astype(dtype)
    tower.update(tree_map(lambda weight: weight.astype(mx.float32), rounded))
    exact = tower(x.astype(mx.float32))
    mx.eval(exact)
    tower.update(rounded)
    with emulated_gpu(version):
        rounded_output = tower(x)
        mx.eval(rounded_output)
    tower.update(weights)
    a, b = (np.array(y.astype(mx.float32)).reshape(len(x), -1) for y in (exact, rounded_output))
    errors = np.linalg.norm(a - b, axis=1) / np.linalg.norm(a, axis=1)
    return float(np.sqrt(np.mean(errors**2)))


@contextmanager
def emulated_gpu(version: str) -> Iterator[None]:
    """Use the GPU code paths of a version, emulated on the CPU."""
    with ExitStack() as stack:

        def patch(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        patch(layers, "on_cpu", lambda: False)
        patch(mx, "addmm", partial(_in_float32, mx.addmm))
        attend = mx.fast.scaled_dot_product_attention
        patch(mx.fast, "scaled_dot_product_attention", partial(_in_float32, attend))
        patch(mx, "conv2d", partial(_conv2d, mx.conv2d))
        if version == "before":
            patch(elementwise, "gelu", nn.gelu)
            patch(elementwise, "bias_gelu", lambda x, bias: nn.gelu(x + bias))
            patch(layers, "add_biases", _add_biases_before)
            patch(fastvit, "add_biases", _add_biases_before)
        if version == VERSIONS[2]:
            patch(depthwise, "use_own", lambda: True)
            patch(depthwise, "_kernel", lambda _: _own_kernel)
        yield


def _in_float32(function: Function, *arrays: mx.array, **options: Any) -> mx.array:
    """Compute in float32 and round the result."""
    wide = function(*(array.astype(mx.float32) for array in arrays), **options)
    return wide.astype(arrays[0].dtype)


def _conv2d(
    conv2d: Function,
    x: mx.array,
    weight: mx.array,
    stride: int,
    padding: int,
    dilation: int = 1,
    groups: int = 1,
) -> mx.array:
    """Emulate MLX's convolutions; depthwise ones round each product."""
    if groups == 1:
        return _in_float32(partial(conv2d, stride=stride, padding=padding), x, weight)
    sides = [-(-side // stride) for side in x.shape[1:3]]
    x = mx.pad(x, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
    total = mx.zeros((len(x), *sides, x.shape[3]))
    for i in range(weight.shape[1]):
        for j in range(weight.shape[2]):
            rows, columns = (
                slice(k, k + stride * n, stride) for k, n in zip((i, j), sides, strict=True)
            )
            total = total + (x[:, rows, columns] * weight[:, i, j, 0]).astype(mx.float32)
        mx.eval(total)
    return total.astype(x.dtype)


def _add_biases_before(
    x: mx.array, layer: nn.Module, next_bias: mx.array
) -> tuple[mx.array, mx.array]:
    x = x + layer.bias
    return x, x + next_bias


def _own_kernel(
    *, inputs: list[mx.array], template: list[tuple[str, Any]], **_: Any
) -> list[mx.array]:
    """Emulate the kernel in `gpu/depthwise.py`: float32 sums and biases, rounded once."""
    x, weight, biases = inputs
    values = dict(template)
    size, stride, outputs = values["K"], values["S"], values["M"]
    kernels = weight.astype(mx.float32).T.reshape(-1, outputs, size, size, 1)
    parts = [kernels[:, i] for i in range(outputs)]
    matrix = cpu_depthwise.banded_matrix(parts, stride)
    sums = whole(cpu_depthwise.depthwise_conv(x.astype(mx.float32), matrix, size, stride))
    return [(sums + biases[:, None, None, None]).astype(x.dtype)]


if __name__ == "__main__":
    main()
