"""The command line of mlx_mobileclip with a small stand-in for the model."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import standin
from standin import COLOURS, paint

import mlx_mobileclip

ROOT = Path(__file__).parents[2]


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replace `load` by the stand-in; the list holds the arguments of each call."""
    calls: list[Any] = []

    def load(*args: Any, **options: Any) -> Any:
        calls.append((args, options))
        return standin.load()

    monkeypatch.setattr(mlx_mobileclip, "load", load, raising=False)
    monkeypatch.setenv("MLX_MOBILECLIP_CACHE", str(tmp_path / "cache"))
    return calls


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    root.mkdir()
    for i, colour in enumerate(COLOURS):
        paint(root / f"{colour}.png", colour, seed=i)
    return root


@pytest.fixture
def start() -> Callable[..., subprocess.Popen[str]]:
    """Start the command line in a subprocess; each batch of images takes 0.1 s."""

    def popen(*args: str) -> subprocess.Popen[str]:
        code = (
            "import sys; sys.path.insert(0, sys.argv.pop(1)); import mlx_mobileclip, standin\n"
            "mlx_mobileclip.load = standin.load\n"
            "from mlx_mobileclip.__main__ import main; sys.exit(main())\n"
        )
        return subprocess.Popen(
            [sys.executable, "-c", code, str(ROOT / "tests/support"), *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "STANDIN_SECONDS": "0.1"},
        )

    return popen
