"""Settings of the whole process: made once, on a CPU only, unless disabled."""

import ctypes
from types import SimpleNamespace

import pytest

from mlx_mobileclip.cpu import process

pytestmark = pytest.mark.skipif(not process.on_cpu(), reason="the settings are for a CPU")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Record the calls to glibc and OpenBLAS, as in a process that has both."""
    made: list[tuple[int, ...]] = []
    library = SimpleNamespace(
        mallopt=lambda *a: made.append(a), openblas_set_num_threads=lambda *a: made.append(a)
    )
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))
    process._configure_once.cache_clear()
    yield made
    process._configure_once.cache_clear()


def test_settings_are_made_once(calls: list[tuple[int, ...]]) -> None:
    process.configure()
    assert [call[0] for call in calls] == [
        process.MMAP_MAX, process.TRIM_THRESHOLD, process.TOP_PAD, 1,
    ]  # fmt: skip
    process.configure()
    assert len(calls) == 4


def test_other_blas_and_libc_are_not_changed(
    calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    process.configure()
    assert not calls


def test_environment_variable_disables_the_settings(
    calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_MOBILECLIP_PROCESS_SETTINGS", "0")
    process.configure()
    assert not calls


def test_nothing_is_set_for_a_gpu(
    calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "on_cpu", lambda: False)
    process.configure()
    assert not calls
