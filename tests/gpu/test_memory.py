"""Memory limits, with MLX's functions mocked, as they must run without Metal."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import mlx.core as mx
import pytest

from mlx_fastvlm.models.kv_cache import KVCache
from mlx_mobileclip import device
from mlx_mobileclip.gpu import memory
from mlx_mobileclip.terminal import run_command

GB = 10**9


@pytest.mark.parametrize(
    ("info", "limit"),
    [
        ({"memory_size": 8 << 30}, 256 << 20),  # a Mac
        ({"memory_size": 16 << 30}, 1 << 30),
        ({"total_memory": 80 << 30}, 1 << 30),  # an NVIDIA GPU
        ({"device_name": "AMD EPYC"}, 1 << 30),
    ],
)
def test_every_command_limits_the_cache(
    monkeypatch: pytest.MonkeyPatch, info: dict[str, Any], limit: int
) -> None:
    limits: list[int] = []
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setattr(mx, "set_cache_limit", limits.append)
    assert run_command(lambda: limits.append(0), debug=False) == 0
    assert limits == [limit, 0]  # before the command runs


class Metal:
    """The wired limit of a Mac."""

    limit = 7
    history: list[int]

    def __init__(self) -> None:
        self.history = []

    def set(self, limit: int) -> int:
        before, self.limit = self.limit, limit
        self.history.append(limit)
        return before


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Metal]:
    state = Metal()
    monkeypatch.setattr(memory, "backend", lambda: "metal")
    info = {"max_recommended_working_set_size": 5 * GB}
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setattr(mx, "set_wired_limit", state.set)
    yield state
    assert state.limit == 7


def test_weights_are_wired_while_answers_overlap(metal: Metal) -> None:
    first, second = ExitStack(), ExitStack()
    first.enter_context(memory.wired_weights())
    second.enter_context(memory.wired_weights())
    first.close()
    assert metal.limit == 5 * GB
    second.close()
    assert metal.history == [5 * GB, 7]


def test_wired_limit_is_restored_after_an_error(metal: Metal) -> None:
    with pytest.raises(KeyError), memory.wired_weights():
        raise KeyError
    assert metal.history == [5 * GB, 7]


def test_nothing_is_wired_without_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "set_wired_limit", pytest.fail)
    monkeypatch.setattr(memory, "backend", lambda: "cuda")
    with memory.wired_weights():
        pass


@pytest.mark.parametrize(("on_cpu", "rows"), [(True, 1280), (False, 512)])
def test_kv_cache_allocates_one_step_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, on_cpu: bool, rows: int
) -> None:
    monkeypatch.setattr(device, "on_cpu", lambda: on_cpu)
    cache = KVCache(capacity=300 + 900)
    keys = mx.random.normal((1, 2, 300, 4))
    cache.update_and_fetch(keys, keys)
    assert cache.nbytes == 2 * rows * 2 * 4 * 4
    steps = [mx.random.normal((1, 2, 1, 4)) for _ in range(213)]
    for step in steps:  # into the next 256
        found, _ = cache.update_and_fetch(step, step)
    assert mx.array_equal(found, mx.concatenate([keys, *steps], axis=2)).item()
    assert cache.nbytes == 2 * max(rows, 768) * 2 * 4 * 4
