"""Work divided among cores gives the same result, also in threads."""

import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from cores import divide, graph_names
from tolerances import BATCHED, relative_error

from mlx_mobileclip.cpu import executor
from mlx_mobileclip.cpu.rows import whole
from mlx_mobileclip.layers import DepthwiseConv, self_attention
from mlx_mobileclip.models.transformer import TransformerLayer

pytestmark = pytest.mark.skipif(
    mx.default_device().type != mx.DeviceType.cpu, reason="tests implementations for the CPU"
)


def test_parts_are_divided_on_their_own_core(
    three_cores: list[mx.Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    """This bounds memory; also after a part has failed."""
    monkeypatch.setattr(executor, "LARGEST_PART", 30)

    def outer(start: int, stop: int) -> mx.array:
        if stop > 9:
            raise ValueError("no more")
        return executor.on_all_cores(
            lambda i, j: mx.arange(start + i, start + j), stop - start, 0, 60
        )

    with pytest.raises(ValueError, match="no more"):
        executor.on_all_cores(outer, 12, axis=0, work_size=1)
    three_cores.clear()
    assert executor.on_all_cores(outer, 9, axis=0, work_size=1).tolist() == list(range(9))
    assert len(three_cores) == 9
    assert all(three_cores[i : i + 3] == [three_cores[i]] * 3 for i in (0, 3, 6))
    assert three_cores[0] != three_cores[3] != three_cores[6]


@pytest.mark.parametrize("cores", [2, 5])
def test_work_divided_among_cores_is_the_same(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts may be unequal; there are at most as many as images, rows of tiles or heads."""
    layer = DepthwiseConv(8, 7)
    layer.weight = mx.random.normal(layer.weight.shape)
    layer.eval()
    x, qkv = mx.random.normal((4, 9, 13, 8)), mx.random.normal((2, 256, 3, 3, 32))
    undivided = whole(layer(x)), whole(layer(x[:1])), self_attention(qkv, training=False)
    mx.eval(undivided)
    started = divide(monkeypatch, cores)
    divided = whole(layer(x)), whole(layer(x[:1])), self_attention(qkv, training=False)
    errors = [relative_error(a, b) for a, b in zip(divided, undivided, strict=True)]
    assert errors[:2] == [0, 0]  # the same product for each strip
    assert errors[2] < BATCHED  # products of some of the queries
    tiles = min(3, cores)  # rows of tiles
    rows, positions = started[:tiles], started[2 * tiles :]
    assert started == rows + rows + positions
    assert len(set(map(str, rows))) == tiles
    assert len(set(map(str, positions))) == len(positions) == cores
    gradient = mx.grad(lambda x: (whole(layer(x)) ** 2).sum())(x)
    layer.train()
    plain = mx.grad(lambda x: (whole(layer(x)) ** 2).sum())(x)
    assert relative_error(gradient, plain) < 1e-5


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_freed_memory_is_kept() -> None:
    """A repeated computation reuses the pages it had before."""
    code = (
        "import resource, mlx.core as mx; from mlx_mobileclip.cpu.process import configure\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    mx.eval(mx.ones(5_000_000) + mx.arange(5_000_000))\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "given_back = [faults(), faults()][1]; configure()\n"
        "print(given_back, [faults(), faults()][1])"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    given_back, reused = map(int, process.stdout.split())
    assert reused < 100 < given_back


def test_work_divided_in_other_threads_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Concurrent threads have separate streams; an ended thread hands its streams on."""
    monkeypatch.setattr(executor, "cores", lambda: 3)
    monkeypatch.setattr(executor, "PARALLEL_FROM", 0)
    monkeypatch.setattr(executor, "LARGEST_PART", 300)
    monkeypatch.setattr(executor, "_thread", executor._Thread())
    monkeypatch.setattr(executor, "_released", [])
    layer, x = DepthwiseConv(8, 7).eval(), mx.random.normal((1, 9, 13, 8))
    layer.weight = mx.random.normal(layer.weight.shape)
    here = np.array(whole(layer(x)))
    streams: list[list[mx.Stream]] = []

    def compute(_: int) -> np.ndarray:
        result = np.array(whole(layer(x)))
        streams.append(executor._streams()[1:])
        return result

    for _ in range(5):
        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(compute, range(20)))
            pool.submit(mx.clear_streams).result()
        assert all(np.array_equal(here, result) for result in results)
    assert all(len(others) == 2 for others in streams)
    assert sum(streams.index(others) == i for i, others in enumerate(streams)) <= 4


@pytest.mark.parametrize("images", [1, 2, 7])
def test_batch_divided_among_cores_is_the_same(
    images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several parts per core, one after another."""
    layer = TransformerLayer(64, 2, 256, 1e-5).eval()
    x = mx.random.normal((images, 9, 64))
    whole = np.array(layer(x))
    monkeypatch.setattr(executor, "cores", lambda: 2)
    monkeypatch.setattr(executor, "PARALLEL_FROM", 0)
    monkeypatch.setattr(executor, "LARGEST_PART", 500)
    sizes: list[int] = []

    def record_size(x: mx.array) -> mx.array:
        sizes.append(len(x))
        return layer(x)

    divided = executor.by_items(record_size, x)
    assert graph_names(divided).count("Depends") == max(0, images - 2)
    assert relative_error(np.array(divided), whole) < 1e-6
    assert sizes == [1] * images
    gradients = [
        mx.grad(lambda x, f=f: f(x).sum())(x) for f in (layer, partial(executor.by_items, layer))
    ]
    assert relative_error(np.array(gradients[1]), np.array(gradients[0])) < 1e-5
