"""Accuracy of the MobileCLIP demo model on held-out scenes."""

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from captions import LABELS
from measure import mobileclip_accuracy
from questions import description
from tolerances import BATCHED, HALF_PRECISION_COSINE, relative_error
from world import HELD_OUT, render, scene

from mlx_mobileclip import MobileCLIP, Processor, load

ROOT = Path(__file__).parents[2]
SCENES = [scene(HELD_OUT + i, central=True) for i in range(6)]
# Lower bounds in percent; tests/demo/README.md has the accuracy on more scenes.
FLOORS = {"zero-shot top-1": 93, "image to text R@1": 85, "text to image R@1": 85}
Demo = tuple[MobileCLIP, Processor]


@pytest.fixture(scope="module")
def demo() -> Demo:
    return load("demo", dtype="float32")


def embeddings(demo: Demo) -> tuple[mx.array, mx.array]:
    model, processor = demo
    pixels = processor.images([render(shown) for shown in SCENES])
    ids = processor.texts([description(shown) for shown in SCENES])
    return model.encode_image(pixels, normalize=True), model.encode_text(ids, normalize=True)


def test_accuracy() -> None:
    found = mobileclip_accuracy("demo", count=40, among=40)
    print(found)  # seen with -rP
    assert found.keys() >= FLOORS.keys()
    assert {name: found[name] for name, floor in FLOORS.items() if found[name] < floor} == {}


def test_a_batch(demo: Demo) -> None:
    model, processor = demo
    images, texts = embeddings(demo)
    for shown, image, text in zip(SCENES, images, texts, strict=True):
        pixels, ids = processor.images([render(shown)]), processor.texts([description(shown)])
        assert relative_error(model.encode_image(pixels, normalize=True)[0], image) < BATCHED
        assert relative_error(model.encode_text(ids, normalize=True)[0], text) < BATCHED


def test_half_precision(demo: Demo) -> None:
    for whole, half in zip(
        embeddings(demo), embeddings(load("demo", dtype="float16")), strict=True
    ):
        assert mx.min(mx.sum(whole * half, axis=-1)).item() > HALF_PRECISION_COSINE


def test_command_line(tmp_path: Path) -> None:
    """A scene with one shape is classified correctly among 48 labels."""
    (shape,) = (shown := scene(HELD_OUT + 7, (1, 1), central=True)).shapes
    path = tmp_path / "scene.png"
    render(shown).save(path)
    options = ["--model", "demo", "--image", str(path), "--labels", ",".join(LABELS)]
    done = subprocess.run(
        [sys.executable, "-m", "mlx_mobileclip", "classify", *options],
        cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1", "MLX_MOBILECLIP_CACHE": str(tmp_path)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].endswith(shape.name)
