"""`check` passes on correct models, within the memory of their largest layer."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from synthetic_clip import tiny_config

from mlx_fastvlm import load
from mlx_fastvlm.check import fastvlm
from mlx_fastvlm.check.command import main
from mlx_fastvlm.loader import find_checkpoint, read_canonical
from mlx_fastvlm.models.config import FastVLMConfig
from mlx_fastvlm.models.fastvlm import IMAGE_TOKEN, PARTS, FastVLM
from mlx_fastvlm.preprocess.processor import Inputs
from mlx_mobileclip.__main__ import main as clip_main
from mlx_mobileclip.check import forms
from mlx_mobileclip.check.bounds import BOUNDS, Bounds
from mlx_mobileclip.check.compare import Models, Row, relative_error
from mlx_mobileclip.check.mobileclip import mobileclip_steps
from mlx_mobileclip.check.picture import draw
from mlx_mobileclip.checkpoints.weights import named_parameters
from mlx_mobileclip.models.clip import MobileCLIP
from mlx_mobileclip.quantization import Quantization, quantize_parts

FLOAT32 = BOUNDS["float32"]


def run_fastvlm(read: Any, bounds: Bounds, question: int = 12) -> list[Row]:
    models = Models(FastVLM, read, mx.float32, "model", fastvlm.TABLES)
    ids = [*range(4), *[IMAGE_TOKEN] * 4, *range(20, 20 + question)]
    pixels = np.asarray(draw().resize((128, 128)), np.float32)[None] / 255
    inputs = Inputs(mx.array(ids), mx.array(pixels))
    return [row for step in fastvlm.fastvlm_steps(models, inputs, bounds) for row in step()]


def random_weights(model: nn.Module) -> dict[str, mx.array]:
    """Random weights, scaled so that activations keep their magnitude."""
    rng = np.random.default_rng(0)
    return {
        name: mx.array(
            rng.standard_normal(value.shape, np.float32)
            / max(1, int(np.prod(value.shape[1:]))) ** 0.5
        )
        for name, value in named_parameters(model).items()
    }


@pytest.mark.parametrize("run", [main, lambda argv: clip_main(["check", *argv])])
def test_demo(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--model", "demo", "--dtype", "float32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("All right: ")
    assert max(map(len, lines)) <= 80
    assert {form.name for form in forms.FORMS} <= {line[:41].rstrip() for line in lines}


def test_demo_in_float16_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "demo", "--dtype", "float16", "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["right"] and not err
    assert report["machine"]["python"] and report["seconds"] > 0
    assert 1e6 < report["peak_memory_bytes"] < 1e8
    errors = [row["error"] for row in report["comparisons"]]
    assert max(errors) < BOUNDS["float16"].part / 3  # the bounds have a margin
    assert max(errors) > BOUNDS["float16"].part / 20  # of a limited size


@pytest.mark.parametrize(("mode", "bits"), [("affine", 4), ("mxfp4", 4)])
def test_quantized(mode: str, bits: int) -> None:
    model, _ = load("demo", dtype="float32")
    quantize_parts(model, PARTS, PARTS, Quantization.of(mode, bits, 32))
    rows = run_fastvlm(lambda: (model.config, named_parameters(model)), FLOAT32)
    assert [row.name for row in rows if not row.right] == []


@pytest.mark.parametrize("variant", ["MobileCLIP-B", "MobileCLIP-S0"])
def test_other_towers(variant: str) -> None:
    config = tiny_config(variant)
    tensors = random_weights(MobileCLIP(config))
    models = Models(MobileCLIP, lambda: (config, dict(tensors)), mx.float32, "model")
    size = config.preprocess.image_size
    pixels = np.asarray(draw().resize((size, size)), np.float32)[None] / 255
    assert config.text is not None
    ids = np.zeros((2, config.text.context_length), np.int32)
    ids[:, :4] = [[1, 2, 3, config.text.vocab_size - 1], [5, 6, 7, config.text.vocab_size - 1]]
    steps = mobileclip_steps(models, mx.array(pixels), mx.array(ids), FLOAT32.part)
    rows = [row for step in steps for row in step()]
    assert [row.name for row in rows if not row.right] == []
    assert {"image projection", "text layer 0", "text projection"} <= {row.stage for row in rows}


def saved(directory: Path, config: FastVLMConfig) -> Any:
    """Save random weights in bfloat16; returns a function that reads them lazily."""
    path = str(directory / "model.safetensors")
    weights = named_parameters(FastVLM(config))
    half = {n: v.astype(mx.bfloat16) if v.dtype == mx.float32 else v for n, v in weights.items()}
    mx.save_safetensors(path, half)
    return lambda: (config, dict(mx.load(path)))  # type: ignore[arg-type]


def demo_config(**text: Any) -> FastVLMConfig:
    config, _ = read_canonical(find_checkpoint("demo"))
    return replace(config, text=replace(config.text, **text))


def peak(read: Any) -> int:
    """Peak memory in bytes, with a question too short for weights to be dequantised at once."""
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    run_fastvlm(read, Bounds(1, 1), question=4)
    return mx.get_peak_memory() - before


def test_memory_of_many_layers(tmp_path: Path) -> None:
    """At most one layer is in memory, in bfloat16 and in float32."""
    sizes = {"hidden_size": 256, "intermediate_size": 2048, "num_attention_heads": 8}
    config = demo_config(**sizes, num_hidden_layers=24)
    layer = 4 * (3 * 256 * 2048 + 256 * 256 * 5 // 2)
    assert peak(saved(tmp_path, config)) < 2 * layer < 24 * layer / 10


def test_memory_of_a_large_vocabulary(tmp_path: Path) -> None:
    """The embedding table is never in float32 as a whole."""
    table = Quantization.of("affine", 4, 64)
    config = replace(
        demo_config(vocab_size=1 << 17), quantization={"language_model.embed_tokens": table}
    )
    in_float32 = (1 << 17) * 192 * 4
    assert peak(saved(tmp_path, config)) < 0.6 * in_float32


def test_relative_error() -> None:
    exact = np.ones((10, 4), np.float32)
    exact[0] *= 1e6  # a position that would hide the errors of the others
    exact[1] *= 1e-9  # and one that is almost zero
    actual = exact.copy()
    assert relative_error(mx.array(exact), mx.array(actual)) == 0
    actual[1] *= 2
    assert relative_error(mx.array(exact), mx.array(actual)) < 1e-8
    actual[2] *= 1.1
    assert relative_error(mx.array(exact), mx.array(actual)) == pytest.approx(0.1 / 10**0.5)
    actual[3, 0] = float("nan")
    assert not Row("stage", "", relative_error(mx.array(exact), mx.array(actual)), 1.0).right


def test_usage() -> None:
    for run in (main, lambda argv: clip_main(["check", *argv])):
        with pytest.raises(SystemExit) as ended:
            run(["--dtype", "int8"])
        assert ended.value.code == 2
