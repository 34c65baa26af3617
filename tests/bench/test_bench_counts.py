"""Kernels and memory traffic of each step on an Apple GPU, counted without running it."""

import io
import re
import shutil
import sys
from collections.abc import Callable, Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from bench import counts, roofline
from bench.chips import CHIPS
from bench.graph import VIEWS, Graphs, gpu_graphs, leaf
from mlx_mobileclip.gpu import elementwise

# For the 0.5B: primitives, and MB read and written. Lower a figure when it falls. The first three
# have targets: 6; 440 and 2500 MB; 390. mlx-vlm 0.7.10 has 16; 855 and 7047 MB; 487.
PINNED = {
    counts.BLOCK: (6, 34.6),
    counts.VISION: (341, 2385),  # two of them cast the mean of squeeze-and-excitation
    "decode step, 4-bit": (343, 1.82),
    "decode step, float16": (316, 1.65),
    "prefill of 300 tokens, float16": (316, 376.5),
    "prefill of 300 tokens, 4-bit": (340, 409.8),
}
MAP, BIASES = (1, 2, 3, 4), (2, 4)


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    with gpu_graphs() as graphs:
        yield graphs


def test_counts_of_the_05b(graphs: Graphs) -> None:
    counted = counts.count_ours(graphs, "0.5b")
    assert {step: len(kernels) for step, kernels in counted.items()} == {
        step: primitives for step, (primitives, _) in PINNED.items()
    }
    for step, (_, megabytes) in PINNED.items():
        assert counts.elements(counted[step]) == pytest.approx(megabytes, rel=0.01), step


def test_roofline_is_plausible(graphs: Graphs) -> None:
    """FLOPs equal hand counts, times stay above the floor, and larger chips are faster."""
    stages = roofline.read_stages(graphs, "0.5b", 512)
    flops = {stage: sum(kernel.flops for kernel in kernels) for stage, kernels in stages.items()}
    tower = sum(flops[stage] for stage in list(stages)[:7])
    assert tower == pytest.approx(2 * 59.56e9, rel=1e-3)
    assert flops["projector"] == 2 * 64 * (3072 * 896 + 896 * 896)
    assert flops["prefill of 108 tokens"] == pytest.approx(2 * (108 * 357.8e6 + 136.1e6), rel=0.02)
    for kernels in stages.values():
        seconds = {name: roofline.stage_figures(kernels, chip) for name, chip in CHIPS.items()}
        assert all(row["floor_ms"] < row["expected_ms"] for row in seconds.values())
        assert seconds["m1"]["floor_ms"] > seconds["m1-max"]["floor_ms"]
        assert seconds["m1"]["expected_ms"] > seconds["m5-max"]["expected_ms"]


def test_views_cost_nothing(graphs: Graphs) -> None:
    x, w, bias = leaf(mx.zeros((2, 3, 4))), leaf(mx.zeros((5, 4))), leaf(mx.zeros((5,)))
    kernels = graphs.kernels(lambda: ((x.reshape(6, 4) @ w.T) + bias)[None].transpose(0, 2, 1))
    assert {kernel.name: kernel.bytes for kernel in kernels} == {
        "Matmul": 4 * (24 + 20 + 30),
        "Add": 4 * (30 + 5 + 30),
    }


def test_fused_operations_count_as_one_kernel(graphs: Graphs) -> None:
    """Compiled functions within others too; attention where Metal has a kernel for the width."""
    x = leaf(mx.zeros((1, 2, 8, 64), mx.float16))

    def attend(width: int) -> mx.array:
        part = x[..., :width]
        return mx.fast.scaled_dot_product_attention(part, part, part, scale=1.0)

    def names(build: Callable[[], mx.array]) -> list[str]:
        return [kernel.name for kernel in graphs.kernels(build)]

    assert names(lambda: elementwise.swiglu(x, x)) == ["Compiled"]
    assert names(lambda: attend(64)) == ["ScaledDotProductAttention"]
    assert {"Matmul", "Softmax"} <= set(names(lambda: attend(32)))


def test_reading_graphs_changes_no_state() -> None:
    """A compiled function first traced while graphs are read computes what it should."""
    x = mx.linspace(-4, 4, 24)
    mx.eval(x)
    silu, compiled = nn.silu, mx.compile(lambda x: nn.silu(x) * x, shapeless=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn, "traced", compiled, raising=False)  # where gpu_graphs finds it
        with gpu_graphs() as graphs:
            assert len(graphs.kernels(lambda: vars(nn)["traced"](x))) == 1
            assert mx.default_device().type == mx.DeviceType.gpu
    assert nn.silu is silu
    expected = np.array(x) ** 2 / (1 + np.exp(-np.array(x)))
    assert np.allclose(np.array(compiled(x)), expected, atol=1e-6)


@pytest.mark.skipif(
    sys.platform == "linux" and shutil.which("g++") is None, reason="MLX compiles with g++ here"
)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (elementwise.gelu, [MAP]),
        (elementwise.bias_gelu, [MAP, (4,)]),
        (elementwise.add_biases, [MAP, BIASES]),
        (elementwise.swiglu, [MAP, MAP]),
    ],
)
def test_compiled_functions_become_one_kernel(
    function: Callable[..., mx.array], shapes: list[tuple[int, ...]], dtype: mx.Dtype
) -> None:
    """MLX's own graphs show them as one primitive, which `gpu_graphs` relies on."""
    listing = io.StringIO()
    arrays = [mx.ones(shape, dtype if shape != BIASES else mx.float32) for shape in shapes]
    mx.export_to_dot(listing, function(*arrays))
    names = re.findall(r'label ="(\w+)"', listing.getvalue())
    assert len([name for name in names if name.startswith("Compiled")]) == 1
    assert {name for name in names if not name.startswith("Compiled")} <= {*VIEWS, "Full"}
