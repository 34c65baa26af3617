"""Loss of accuracy by quantisation, on the demo model."""

from pathlib import Path

import pytest
from measure import check_answers, questions
from world import HELD_OUT, render, scene

from convert import __main__ as command
from mlx_fastvlm import load

pytestmark = pytest.mark.parity
SCENES = range(HELD_OUT + 10_000, HELD_OUT + 10_100)
TASKS = ("count", "colour", "shape", "position", "size", "presence", "read")
MAX_LOSS = {"8 bits": 0.5, "4 bits, mixed": 2.0}  # percentage points, over all answers
QUANTIZATIONS = {"8 bits": ("--q-bits", "8"), "4 bits, mixed": ("--q-bits", "4", "--q-mixed")}


def accuracy(path: Path | str) -> float:
    """Exact-match accuracy in percent."""
    demo = load(path, dtype="float32")
    found: list[bool] = []
    for seed in SCENES:
        shown = scene(seed)
        found += check_answers(*demo, render(shown), questions(shown, TASKS))
    assert len(found) > 500
    return 100 * sum(found) / len(found)


def test_loss_of_accuracy_is_small(tmp_path: Path) -> None:
    """Measured with dequantised weights, which is faster on a CPU."""
    baseline = accuracy("demo")
    assert baseline > 90
    for name, options in QUANTIZATIONS.items():
        quantized, floats = tmp_path / name, tmp_path / f"{name}, dequantised"
        base = ["--model", "demo", "--mlx-path", str(quantized), "--quiet", "-q", *options]
        assert command.main(base) == 0
        base = ["--model", str(quantized), "--mlx-path", str(floats), "--quiet", "--dequantize"]
        assert command.main([*base, "--dtype", "float32"]) == 0
        lost = baseline - accuracy(floats)
        print(f"{name}: {lost:.2f} points of {baseline:.1f} % lost")  # seen with -rP
        assert lost <= MAX_LOSS[name]
