"""Fixtures for the tests of computations on the CPU."""

import mlx.core as mx
import pytest
from cores import divide


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed MLX, as some bounds are close to the errors of random values."""
    mx.random.seed(0)


@pytest.fixture
def three_cores(monkeypatch: pytest.MonkeyPatch) -> list[mx.Stream]:
    """Divide all work among three cores; returns the streams used."""
    return divide(monkeypatch, 3)
