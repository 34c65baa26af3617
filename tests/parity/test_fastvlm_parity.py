"""Full-size FastVLM-0.5B against PyTorch: every stage, every layout, greedy answers.

The weights are random, rounded to bfloat16 as in Apple's files, with non-trivial BatchNorm
statistics and layer scales. Run with a fast BLAS preloaded (see README).
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import synthetic
from tolerances import STAGE_FLOAT32, relative_error

from mlx_fastvlm import FastVLM, Processor, generate, load
from mlx_mobileclip.checkpoints.weights import named_parameters
from mlx_mobileclip.layers import whole

pytest.importorskip("torch", reason="needs the parity extra")
import oracle

torch = oracle.torch
pytestmark = pytest.mark.parity

IMAGES = [
    np.random.default_rng(i).integers(0, 256, (90 + 40 * i, 160 - 30 * i, 3), np.uint8)
    for i in range(3)
]
QUESTION = "What is in these pictures, and in what order? "


@pytest.fixture(scope="module")
def tensors() -> synthetic.Tensors:
    """Values that bfloat16 holds exactly, so that files and oracle agree to the bit."""
    return {
        key: np.array(mx.array(value).astype(mx.bfloat16).astype(mx.float32))
        for key, value in synthetic.apple_tensors("0.5b").items()
    }


@pytest.fixture(scope="module")
def reference(tensors: synthetic.Tensors) -> Any:
    return oracle.fast_vlm(tensors, "0.5b")


@pytest.fixture(scope="module")
def loaded(
    tensors: synthetic.Tensors, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[FastVLM, Processor]]:
    path = tmp_path_factory.mktemp("apple") / "model"
    write_full(path, tensors, synthetic.apple_config("0.5b"))
    model = load(path, dtype="float32")
    shutil.rmtree(path)
    yield model


def write_full(
    path: Path, tensors: synthetic.Tensors, config: dict[str, Any], **options: Any
) -> None:
    synthetic.write(path, tensors, config, dtype=mx.bfloat16, **options)
    synthetic.write_tokenizer(path, size=151643)


def our_stages(model: FastVLM, pixels: mx.array) -> dict[str, mx.array]:
    tower = model.vision_tower
    x = tower.stem(pixels)
    outputs = {"stem": whole(x)}
    for i, stage in enumerate(tower.stages):
        x = stage(x)
        outputs[f"stages.{i}"] = whole(x)
        mx.eval(outputs)
    outputs["final_conv"] = tower.final_conv(x)
    outputs["projector"] = model.encode_image(pixels)
    return outputs


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Compare by stage; prints the errors, so that a failure shows where they begin."""
    errors = {name: relative_error(ours[name], theirs[name]) for name in theirs}
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) < STAGE_FLOAT32, errors
    return errors


@pytest.mark.parametrize("resolution", [256, 1024])
def test_every_stage_of_tower_and_projector(
    loaded: tuple[FastVLM, Processor], reference: Any, resolution: int
) -> None:
    model, processor = loaded
    pixels = processor("", [IMAGES[0]], resolution=resolution).pixels
    assert pixels is not None
    modules = oracle.tower_modules(reference.model.vision_tower.timm_model)
    with oracle.recorded(modules) as theirs, torch.inference_mode():
        features = reference.get_image_features(oracle.nchw(pixels)).pooler_output
    theirs["projector"] = np.stack([f.numpy() for f in features])
    compare(our_stages(model, pixels), theirs)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_decoder_layers_logits_and_64_greedy_tokens(
    loaded: tuple[FastVLM, Processor], reference: Any, count: int
) -> None:
    model, processor = loaded
    inputs = processor(QUESTION, IMAGES[:count], resolution=256)
    given = {} if inputs.pixels is None else {"pixel_values": oracle.nchw(inputs.pixels)}
    text = reference.model.language_model
    modules = {f"layers.{i}": layer for i, layer in enumerate(text.layers)}
    ids = oracle.ids(inputs.input_ids)
    with oracle.recorded(modules) as theirs, torch.inference_mode():
        logits = reference(input_ids=ids, **given).logits
    theirs["logits"] = logits.numpy()
    features = None if inputs.pixels is None else model.encode_image(inputs.pixels)
    x = model.embed(inputs.input_ids[None], features)
    ours = {}
    for i, layer in enumerate(model.language_model.layers):
        x = ours[f"layers.{i}"] = layer(x, "causal", None)
    ours["logits"] = model(inputs.input_ids[None], pixels=inputs.pixels)
    compare(ours, theirs)

    with torch.inference_mode():
        generated = reference.generate(
            input_ids=ids,
            **given,
            max_new_tokens=64,
            do_sample=False,
            suppress_tokens=list(range(processor.tokenizer.size, logits.shape[-1])),
        )
    answer = generate(model, processor, QUESTION, IMAGES[:count], resolution=256, max_tokens=64)
    assert answer.token_ids == generated[0, ids.shape[1] :].tolist()
    assert len(answer.token_ids) == 64


@pytest.mark.parametrize("layout", ["llava_qwen2, sharded", "fast_vlm", "mlx-vlm", "app export"])
def test_each_layout_gives_the_same_weights(
    loaded: tuple[FastVLM, Processor],
    tensors: synthetic.Tensors,
    layout: str,
    tmp_path: Path,
) -> None:
    """Bit-equal to those of Apple's single file, which the tests above compare with PyTorch."""
    vision_from = None
    if layout == "llava_qwen2, sharded":
        write_full(tmp_path, tensors, synthetic.apple_config("0.5b"), shards=4)
    elif layout == "fast_vlm":
        named = synthetic.renamed(tensors, synthetic.transformers_name)
        padding = synthetic.tensor("padding", (64, 896))
        embedding = "model.language_model.embed_tokens.weight"
        named[embedding] = np.concatenate([named[embedding], padding])
        del named["lm_head.weight"]
        config = synthetic.transformers_config("0.5b")
        config["text_config"]["vocab_size"] = 152000
        write_full(tmp_path, named, config)
    elif layout == "mlx-vlm":
        named = synthetic.renamed(tensors, synthetic.mlx_vlm_name)
        del named["language_model.lm_head.weight"]
        named = {key: synthetic.mlx_layout(key, value) for key, value in named.items()}
        write_full(tmp_path, named, synthetic.apple_config("0.5b", vision_config={}))
    else:
        named = synthetic.renamed(tensors, synthetic.app_export_name)
        config = synthetic.apple_config("0.5b", vision_config={}, tie_word_embeddings=True)
        vision_from = tmp_path / "original"
        write_full(vision_from, tensors, synthetic.apple_config("0.5b"))
        write_full(tmp_path, named, config)
    model, processor = load(tmp_path, dtype="float32", vision_from=vision_from)
    ours, expected = named_parameters(model), named_parameters(loaded[0])
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert mx.array_equal(ours[name], value).item(), name
    assert processor.tokenizer.size == 151646


def test_multi_branch_tower_is_folded_exactly(tmp_path: Path) -> None:
    """The training form, branches and BatchNorms separate, against timm running it unfused."""
    tensors = synthetic.apple_tensors("0.5b", unfused=True)
    trunk = oracle.tower(tensors, inference_mode=False)
    config = synthetic.apple_config("0.5b", num_hidden_layers=1)
    shallow = {k: v for k, v in tensors.items() if not _deep_layer(k)}
    synthetic.write(tmp_path, shallow, config)
    model, processor = load(tmp_path, dtype="float32")
    pixels = processor("", [IMAGES[1]], resolution=256).pixels
    assert pixels is not None
    with oracle.recorded(oracle.tower_modules(trunk)) as theirs, torch.inference_mode():
        trunk.forward_features(oracle.nchw(pixels))
    ours = our_stages(model, pixels)
    compare({name: ours[name] for name in theirs}, theirs)


def _deep_layer(key: str) -> bool:
    return key.startswith("model.layers.") and not key.startswith("model.layers.0.")
