"""What quantising costs the demo model's answers."""

from pathlib import Path

import pytest
from measure import questions, right
from world import HELD_OUT, render, scene

from convert import __main__ as command
from mlx_fastvlm import load

pytestmark = pytest.mark.parity
SCENES = range(HELD_OUT + 10_000, HELD_OUT + 10_100)
TASKS = ("count", "colour", "shape", "position", "size", "presence", "read")
MOST_LOST = {"8 bits": 0.5, "4 bits, mixed": 2.0}  # points, of all answers together
RECIPES = {"8 bits": ("--q-bits", "8"), "4 bits, mixed": ("--q-bits", "4", "--q-mixed")}


def share(path: Path | str) -> float:
    """Of right answers, percent."""
    demo = load(path, dtype="float32")
    found: list[bool] = []
    for seed in SCENES:
        shown = scene(seed)
        found += right(*demo, render(shown), questions(shown, TASKS))
    assert len(found) > 500
    return 100 * sum(found) / len(found)


def test_points_lost(tmp_path: Path) -> None:
    """Answers are those of the packed weights as floats: the same, and quicker on a CPU."""
    whole = share("demo")
    assert whole > 90
    for name, recipe in RECIPES.items():
        packed, floats = tmp_path / name, tmp_path / f"{name}, unpacked"
        base = ["--model", "demo", "--mlx-path", str(packed), "--quiet", "-q", *recipe]
        assert command.main(base) == 0
        base = ["--model", str(packed), "--mlx-path", str(floats), "--quiet", "--dequantize"]
        assert command.main([*base, "--dtype", "float32"]) == 0
        lost = whole - share(floats)
        print(f"{name}: {lost:.2f} points of {whole:.1f} % lost")  # seen with -rP
        assert lost <= MOST_LOST[name]
