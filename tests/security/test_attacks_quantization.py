"""False quantisation claims and hostile configs of converted checkpoints are refused."""

import contextlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import attacks
import isolated
import mlx.core as mx
import pytest
from attacks import Build, Cases, config, put, quantization_block, tensors

from convert.__main__ import main as convert

# False claims about quantisation


def quantized(claim: Any, *, columns: int = 3) -> Build:
    """Quantise one layer with 4 bits in groups of 32, whatever the config claims."""

    def change(loaded: dict[str, Any]) -> None:
        name = "model.layers.0.mlp.down_proj"  # 64 x 96
        loaded[f"{name}.weight"] = mx.zeros((64, 12), mx.uint32)
        for part in ("scales", "biases"):
            loaded[f"{name}.{part}"] = mx.ones((64, columns))

    def build(case: Path) -> None:
        tensors(change)(case)
        config(quantization=claim)(case)

    return build


DOWN = "model.layers.0.mlp.down_proj"
QUANTIZED: Cases = {
    "no claim": (quantized(None), "config.json does not say how it is quantised"),
    "no object": (quantized([4, 32]), "quantization: is not an object"),
    **{
        f"bits {bits!r}": (quantized(quantization_block(bits=bits)), "bits")
        for bits in (0, -4, 1, 7, 10**9, "4", True, 4.5, None)
    },
    **{
        f"group {size!r}": (quantized(quantization_block(group_size=size)), "group_size")
        for size in (0, -32, 48, 10**9, "32", None)
    },
    "group too wide": (
        quantized(quantization_block(group_size=64)),
        "not a multiple of the group_size 64",
    ),
    "other bits": (quantized(quantization_block(bits=8)), "has shape (64, 12) instead of (64, 24)"),
    "scales one too many": (quantized(quantization_block(), columns=4), "has shape (64, 4)"),
    "scales one too few": (quantized(quantization_block(), columns=2), "has shape (64, 2)"),
    "unknown mode": (quantized(quantization_block(mode="exec")), "mode: 'exec' is not one of"),
    "float scales for mxfp4": (quantized(quantization_block(mode="mxfp4")), "is mlx.core.float32"),
    "layer override": (
        quantized({**quantization_block(), DOWN: quantization_block(bits=0)}),
        "bits",
    ),
}


# Configs of converted checkpoints


def canonical(**changes: Any) -> Build:
    """Change the config.json of a converted checkpoint."""

    def build(case: Path) -> None:
        shutil.rmtree(case)
        shutil.copytree(case.parent / "canonical", case, copy_function=os.link)
        values = json.loads((case / "config.json").read_text())
        for key, value in changes.items():
            part, _, field = key.rpartition("__")
            (values[part] if part else values)[field] = value
        put(case / "config.json", json.dumps(values))

    return build


CANONICAL: Cases = {
    "newer": (canonical(format_version=99), "newer than this program"),
    "no version": (canonical(format_version=None), "format_version: is missing"),
    "source a list": (canonical(source=[1, 2]), "source: is not an object"),
    "source nested": (canonical(source={"model": {"a": 1}}), "source: model: is not a string"),
    "source with escapes": (canonical(source={"layout": "\x1b[2J"}), "source: layout: is not a"),
    "quantises nothing": (
        canonical(quantization={"x.y": quantization_block()}),
        "not a layer that can be quantised",
    ),
    "quantises a convolution": (
        canonical(quantization={"vision_tower.stem.conv": quantization_block()}),
        "not a layer that can be quantised",
    ),
    "quantises a norm": (
        canonical(quantization={"language_model.norm": quantization_block()}),
        "not a layer that can be quantised",
    ),
    "quantises floats": (
        canonical(quantization={"language_model.embed_tokens": quantization_block()}),
        "its tensors do not fit its config",
    ),
    "quantises uneven": (
        canonical(
            quantization={
                "language_model.layers.0.mlp.down_proj": quantization_block(group_size=64)
            }
        ),
        "not a multiple of group_size 64",
    ),
    "deeper": (canonical(text_config__num_hidden_layers=256), "missing language_model.layers."),
    "wider": (canonical(text_config__hidden_size=65536), "instead of"),
    "shallower": (canonical(text_config__num_hidden_layers=1), "no place for"),
    "identity": (canonical(projector_type="identity"), "identity needs features as wide"),
    "image size": (canonical(image_size=1 << 40), "image_size"),
    "image mode": (canonical(image_mode="stretch"), "image_mode"),
    "one stage": (canonical(vision_config__layers=[1]), "embed_dims: has 5 entries instead of 1"),
    "text config": (canonical(text_config=[]), "text_config: is not an object"),
}


GROUPS = {"quantization": QUANTIZED, "canonical": CANONICAL}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, isolated.Outcome]:
    """Outcomes of all cases of GROUPS."""
    sound = attacks.write_sound(tmp_path_factory.mktemp("checkpoints"))
    target = str(sound.parent / "canonical")
    arguments = ["--model", str(sound), "--mlx-path", target, "--dtype", "float32", "--quiet"]
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        assert convert(arguments) == 0
    assert stderr.getvalue() == ""
    return attacks.outcomes(sound, attacks.builds(GROUPS))


@pytest.mark.parametrize(("group", "name"), attacks.refused(GROUPS))
def test_false_claim_is_refused(
    outcomes: dict[str, isolated.Outcome], group: str, name: str
) -> None:
    isolated.assert_refused(outcomes[f"{group} {name}"], GROUPS[group][name][1])
