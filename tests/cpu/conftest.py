"""Fixtures for the tests of the CPU's formulations."""

import mlx.core as mx
import pytest
from cores import divide


@pytest.fixture(autouse=True)
def seeded() -> None:
    """MLX seeds itself with the time, and some bounds are close to what random draws reach."""
    mx.random.seed(0)


@pytest.fixture
def three_cores(monkeypatch: pytest.MonkeyPatch) -> list[mx.Stream]:
    """Divide all work among three cores; returns the streams that parts were put on."""
    return divide(monkeypatch, 3)
