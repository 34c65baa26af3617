"""Known problems of machines and versions are found."""

from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_fastvlm.check.command import main
from mlx_mobileclip.check import report
from mlx_mobileclip.check.bounds import BOUNDS, bounds
from mlx_mobileclip.check.machine import Finding, Machine, findings, this_machine

M1 = Machine(
    device="Apple M1",
    backend="metal",
    memory_bytes=16 << 30,
    free_bytes=8 << 30,
    mlx="0.32.4",
    package="0.1.0",
    python="3.12.1",
    system="macOS-15.5-arm64",
    macos="15.5",
    tf32=False,
)
M5 = replace(M1, device="Apple M5 Max", macos="26.2", tf32=True)
FLOAT16_BYTES = 1_200_000_000  # of the 0.5B


def found(
    machine: Machine, dtype: mx.Dtype = mx.float16, size: int = FLOAT16_BYTES
) -> list[Finding]:
    return findings(machine, dtype, size)


@pytest.mark.parametrize("machine", [M1, M5, replace(M5, mlx="0.33.0.dev20261201")])
def test_nothing_is_wrong(machine: Machine) -> None:
    assert found(machine) == []


@pytest.mark.parametrize(
    ("machine", "text"),
    [
        (replace(M1, mlx="0.32.3"), "mlx 0.32.3: 0.32.0 reads wrong scales"),
        (replace(M1, mlx="0.31"), "mlx 0.31: "),
        (replace(M5, macos="26.1"), "macOS 26.1 on Apple M5 Max: MLX uses matrix units"),
        (replace(M5, macos="26"), "macOS 26 on Apple M5 Max: "),
    ],
)
def test_known_to_be_wrong(machine: Machine, text: str) -> None:
    [finding] = found(machine)
    assert finding.wrong and finding.text.startswith(text)


def test_notes() -> None:
    [finding] = found(M5, mx.float32)
    assert not finding.wrong and "MLX_ENABLE_TF32=0" in finding.text
    [finding] = found(replace(M1, memory_bytes=8 << 30), size=5_000_000_000)
    assert not finding.wrong and "needs about 5.9 GB" in finding.text
    assert found(replace(M1, memory_bytes=8 << 30)) == []
    [finding] = found(replace(M1, backend="cpu"))
    assert not finding.wrong and "CPU" in finding.text


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = this_machine()
    assert machine.device and machine.memory_bytes > 1 << 28
    assert machine.free_bytes is None or 0 < machine.free_bytes <= machine.memory_bytes
    assert machine.backend in ("cpu", "metal", "cuda")
    assert not machine.tf32 or machine.backend != "cpu"


def test_bounds_of_float32_allow_tf32_on_a_gpu() -> None:
    assert bounds(mx.float32, replace(M1, backend="cpu")) == BOUNDS["float32"]
    assert bounds(mx.float32, M5) == BOUNDS["float32 on a GPU"]
    assert bounds(mx.bfloat16, M5) == BOUNDS["bfloat16"]


def test_wrong_version_is_the_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "FORMS", ())
    monkeypatch.setattr(report, "this_machine", lambda: replace(this_machine(), mlx="0.32.0"))
    assert main(["--model", "demo", "--dtype", "float32", "--quiet"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "WRONG: mlx 0.32.0"
    assert any(line.startswith("WRONG: mlx 0.32.0: 0.32.0 reads") for line in lines)
