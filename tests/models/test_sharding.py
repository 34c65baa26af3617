"""The decoder divided among processes equals the whole one and takes part of its memory."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
import rank_report
import synthetic
from launch import ROOT, launch, needs_launcher

from convert import convert
from mlx_fastvlm import FastVLM, load
from mlx_fastvlm.loader import DEMO_DIRECTORY, find_checkpoint, read_canonical
from mlx_fastvlm.models.config import FastVLMConfig
from mlx_fastvlm.models.sharding import check_ranks, shard
from mlx_mobileclip.errors import ConfigError
from mlx_mobileclip.json_fields import read_json
from mlx_mobileclip.quantization import Quantization

LAYERS = 16  # of the checkpoint whose memory is measured


def demo_config() -> FastVLMConfig:
    path = DEMO_DIRECTORY / "config.json"
    return FastVLMConfig.from_json(read_json(path), str(path))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sharding")
    convert("demo", root / "float", dtype="float32", quiet=True)
    convert("demo", root / "4bit", dtype="float32", quantize=True, q_group_size=32, quiet=True)
    return {path.name: path for path in root.iterdir()}


class RankOneOfTwo:
    """A group without communication."""

    def rank(self) -> int:
        return 1

    def size(self) -> int:
        return 2


def write_deep(path: Path) -> None:
    """Write the demo with more layers, so that each matrix is a small part of the decoder."""
    config = demo_config()
    config = replace(config, text=replace(config.text, num_hidden_layers=LAYERS))
    tensors = mx.load(str(DEMO_DIRECTORY / "model.safetensors"))
    assert isinstance(tensors, dict)
    first = "language_model.layers.0."
    for name in [name for name in tensors if name.startswith(first)]:
        for i in range(1, LAYERS):
            tensors[name.replace(first, f"language_model.layers.{i}.")] = tensors[name]
    mx.save_safetensors(str(path / "model.safetensors"), tensors)
    (path / "config.json").write_text(json.dumps(config.to_json()))


@pytest.fixture(scope="module")
def reports(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Any]]:
    """Reports of two ranks for each checkpoint, by rank_report.py."""
    out = tmp_path_factory.mktemp("reports")
    script = ROOT / "tests/support/rank_report.py"
    paths = map(str, checkpoints.values())
    _, errors = launch(sys.executable, str(script), str(out), *paths, timeout=170)
    assert len(list(out.iterdir())) == 2 * len(checkpoints), errors
    return {
        name: [np.load(out / f"{name}-{rank}.npz") for rank in range(2)] for name in checkpoints
    }


@needs_launcher
@pytest.mark.parametrize("name", ["float", "4bit"])
def test_two_ranks_compute_what_one_does(
    name: str, checkpoints: dict[str, Path], reports: dict[str, list[Any]]
) -> None:
    model, processor = load(checkpoints[name], dtype="float32")
    whole = rank_report.answers(model, processor)
    for rank in reports[name]:
        error = np.abs(rank["logits"] - whole["logits"]).max() / np.abs(whole["logits"]).max()
        assert error < 1e-5
        assert rank["greedy"].tolist() == whole["greedy"]
        assert rank["divided_bytes"] * 2 == rank_report.divided_bytes(model)
    first, second = reports[name]
    assert first["sampled"].tolist() == second["sampled"].tolist()


def test_whole_decoder_is_never_in_memory(tmp_path: Path) -> None:
    """Each rank reads and cuts one matrix after another."""
    write_deep(tmp_path)
    config, tensors = read_canonical(find_checkpoint(tmp_path))
    decoder = [tensor.nbytes for name, tensor in tensors.items() if "_proj" in name]
    model, group = FastVLM(config), cast(Any, RankOneOfTwo())
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    shard(model, tensors, group, "deep")
    peak = mx.get_peak_memory() - before
    share = rank_report.divided_bytes(model)
    assert share * 2 == sum(decoder)
    assert peak < share + 4 * max(decoder) < 0.75 * sum(decoder)


@pytest.mark.parametrize("size", ["0.5b", "1.5b", "7b"])
def test_published_decoders_can_be_divided_among_two(size: str) -> None:
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    values: dict[str, Any] = {k: synthetic.FULL_TEXT[size][k] for k in (*keys, "intermediate_size")}
    config = demo_config()
    config = replace(config, text=replace(config.text, **values))
    ends = ("self_attn.o_proj", "mlp.down_proj")
    layers = {f"language_model.layers.0.{end}": Quantization() for end in ends}
    for quantization in ({}, layers):
        config = replace(config, quantization=quantization)
        check_ranks(config, 2)
        if size == "7b":
            check_ranks(config, 4)
            with pytest.raises(ConfigError, match=r"among 3 .*; start 2 or 4 with"):
                check_ranks(config, 3)


def test_decoder_that_cannot_be_divided_is_refused() -> None:
    config = demo_config()
    with pytest.raises(ConfigError, match=r"8 heads with 2 for keys and values.*; start 2 with"):
        check_ranks(config, 3)
    layers = {"language_model.layers.0.mlp.down_proj": Quantization(group_size=128)}
    with pytest.raises(ConfigError, match=r"quantised in groups of 128.*in one process"):
        check_ranks(replace(config, quantization=layers), 2)
