"""The FastVLM demo model in every layout has the same tensors and answers."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import demo_layouts
import mlx.core as mx
import pytest
import synthetic
from world import HELD_OUT, render, scene

from mlx_fastvlm import FastVLM, Processor, generate, load
from mlx_fastvlm.loader import Canonical, find_checkpoint, read_canonical
from mlx_mobileclip.checkpoints.hub import Checkpoint

MODEL: str | Path = "demo"
LAYOUTS = ("llava_qwen2", "fast_vlm", "mlx-vlm", "app export")
QUESTIONS = ("How many shapes are there?", "Describe the image.")
SEED = HELD_OUT


@pytest.fixture(scope="module")
def canonical() -> Canonical:
    return read_canonical(find_checkpoint(MODEL))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with an image tower, for app exports."""
    return demo_layouts.write(tmp_path_factory.mktemp("original"), "llava_qwen2", MODEL)


@pytest.fixture(scope="module")
def answers() -> list[list[int]]:
    return ask(*load(MODEL))


def ask(model: FastVLM, processor: Processor) -> list[list[int]]:
    """Token ids of the answers to QUESTIONS."""
    image = render(scene(SEED))
    return [
        generate(model, processor, question, image, resolution=384, max_tokens=24).token_ids
        for question in QUESTIONS
    ]


def assert_same(tensors: dict[str, mx.array], expected: dict[str, mx.array]) -> None:
    """Assert that tensors are bit-equal in float32."""
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert mx.array_equal(tensors[name].astype(mx.float32), value.astype(mx.float32)), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_answers(
    layout: str, canonical: Canonical, original: Path, answers: list[list[int]], tmp_path: Path
) -> None:
    path = demo_layouts.write(tmp_path, layout, MODEL)
    vision_from = original if layout == "app export" else None
    config, tensors = read_canonical(Checkpoint(path, layout), vision_from)
    expected, expected_tensors = canonical
    changes: dict[str, Any] = {"source": config.source}
    if layout == "app export":
        head = tensors.pop("language_model.lm_head.weight")
        assert mx.array_equal(head, tensors["language_model.embed_tokens.weight"])
        changes["text"] = replace(expected.text, tie_word_embeddings=False)
    if layout == "fast_vlm":
        changes["image_size"] = 1024  # the default, as its config.json has no size
    assert config == replace(expected, **changes)
    assert_same(tensors, expected_tensors)
    assert ask(*load(path, vision_from=vision_from)) == answers


@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_shards(layout: str, canonical: Canonical, tmp_path: Path) -> None:
    path = demo_layouts.write(tmp_path, layout, MODEL, shards=3)
    assert len(list(path.glob("*.safetensors"))) == 3
    assert_same(read_canonical(Checkpoint(path, layout))[1], canonical[1])


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_half_precision(layout: str, dtype: mx.Dtype, canonical: Canonical, tmp_path: Path) -> None:
    """Stored in half precision, tensors are rounded once; in float16, the demo's dtype, never."""
    path = demo_layouts.write(tmp_path, layout, MODEL, dtype=dtype)
    rounded = {name: tensor.astype(dtype) for name, tensor in canonical[1].items()}
    assert_same(read_canonical(Checkpoint(path, layout))[1], rounded)
    assert dtype == mx.bfloat16 or all(t.dtype == dtype for t in canonical[1].values())


def test_unfolded_names_are_all_of_apples(canonical: Canonical) -> None:
    """Except those dropped by name; numbers of blocks and layers aside."""

    def first(key: str) -> str:
        return re.sub(r"(network\.\d+|layers)\.\d+\.", r"\1.0.", key)

    names = demo_layouts.apple_names()
    unfolded = {*demo_layouts.unfold(*canonical), "lm_head.weight"}  # which is tied
    written = {first(names[common]) for common in unfolded}
    listed = {first(key) for key in synthetic.read_keys("apple_llava_qwen2_0.5b")}
    dropped = {key for key in listed if key.endswith(("head.proj", "num_batches_tracked"))}
    assert written == listed - dropped
