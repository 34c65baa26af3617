"""The command line, in subprocesses, on a tiny converted checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic_clip
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file
from synthetic_clip import tiny_config, tiny_shapes, values

from convert import __main__ as converter
from mlx_mobileclip import load
from mlx_mobileclip.checkpoints import mobileclip
from mlx_mobileclip.models.variants import VARIANTS

ROOT = Path(__file__).parents[2]
LABELS = ["a cat", "a dog", "nothing at all"]


@pytest.fixture(scope="module", params=["MobileCLIP-S0", "MobileCLIP2-B"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    layout = "apple" if request.param == "MobileCLIP-S0" else "open_clip"
    source = folder / f"{request.param.lower().replace('-', '_')}.pt"
    synthetic_clip.write(source, values(tiny_shapes(request.param, layout)))
    with pytest.MonkeyPatch.context() as patch:
        small = {name: tiny_config(name) for name in VARIANTS}
        patch.setattr(mobileclip, "VARIANTS", small)
        options = ["--model", str(source), "--mlx-path", str(folder / "out"), "--quiet"]
        assert converter.main([*options, "--dtype", "float32", "--verify"]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    paths = [folder / f"{name}.png" for name in "abc"]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(path)
    return paths


def run(tmp_path: Path, *options: Any) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "MLX_MOBILECLIP_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "mlx_mobileclip", *map(str, options), "--quiet"]
    return subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=100, check=False
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_classify_equals_python_api(
    model: Path, images: list[Path], tmp_path: Path, dtype: str
) -> None:
    options = ["classify", "--model", model, "--image", images[0], "--labels", ",".join(LABELS)]
    options += ["--template", "{}", "--json", "--dtype", dtype]
    result = run(tmp_path, *options)
    assert result.returncode == 0, result.stderr
    clip, processor = load(model, dtype=dtype)
    image = clip.encode_image(processor.images([images[0]]), normalize=True)
    texts = clip.encode_text(processor.texts(LABELS), normalize=True)
    assert clip.logit_scale is not None
    logits = np.array(image @ texts.T)[0] * np.exp(clip.logit_scale.item())
    expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    (answer,) = json.loads(result.stdout)["results"]
    probabilities = {found["label"]: found["probability"] for found in answer["predictions"]}
    assert probabilities.keys() == set(LABELS)
    assert all(abs(probabilities[label] - expected[i]) < 1e-4 for i, label in enumerate(LABELS))
    if dtype == "float16":
        return
    again = run(tmp_path, *options)
    assert again.stdout == result.stdout  # text embeddings now come from the cache


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", ["images", "texts"])
def test_embed_equals_python_api(
    model: Path, images: list[Path], tmp_path: Path, kind: str, dtype: str
) -> None:
    """Rows equal those of the Python API, and each is nearest to its own float32 row."""
    rows = []
    for precision in (dtype, "float32"):
        clip, processor = load(model, dtype=precision)
        if kind == "images":
            rows.append(clip.encode_image(processor.images(images), normalize=True))
        else:
            rows.append(clip.encode_text(processor.texts(LABELS), normalize=True))
    expected, exact = (np.array(value) for value in rows)
    source, names = images[0].parent, list(map(str, images))
    if kind == "texts":
        source, names = tmp_path / "texts.txt", LABELS
        source.write_text("\n".join(LABELS) + "\n")
    output = tmp_path / "out.safetensors"
    options = ["--model", model, f"--{kind}", source, "--output", output]
    result = run(tmp_path, "embed", *options, "--dtype", dtype, "--batch-size", 2)
    assert result.returncode == 0, result.stderr
    found = load_file(output)["embeddings"]
    with safe_open(output, framework="numpy") as file:
        assert json.loads(file.metadata()["names"]) == names
    tolerance = {"float32": 1e-5, "float16": 2e-3}[dtype]
    assert np.abs(found - expected).max() < tolerance
    assert (dtype == "float32") == (np.abs(found - exact).max() < 1e-5)
    distances = np.linalg.norm(found[:, None] - exact[None], axis=-1)
    assert (distances.argmin(axis=1) == range(len(names))).all()
