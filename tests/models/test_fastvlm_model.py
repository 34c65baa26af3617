"""FastVLM against golden tensors, mlx-lm's decoder and its own batches, caches and threads."""

import threading
from pathlib import Path
from typing import Any

import make_golden
import mlx.core as mx
import numpy as np
import pytest
import synthetic
from safetensors import safe_open
from tolerances import (
    BATCHED,
    BFLOAT16,
    FLOAT16,
    FOLD_FLOAT32,
    KV_8BIT,
    SAME_WEIGHTS,
    STAGE_FLOAT32,
    relative_error,
)

from mlx_fastvlm import ConfigError, FastVLM, ImageError, Processor, PromptError, generate, load
from mlx_fastvlm.models.config import Qwen2Config, projector_depth
from mlx_fastvlm.models.fastvlm import IMAGE_TOKEN
from mlx_fastvlm.models.kv_cache import KVCache, QuantizedKVCache
from mlx_fastvlm.models.qwen2 import Qwen2
from mlx_mobileclip.layers import whole

GOLDEN = Path(__file__).parents[1] / "support" / "golden"


def golden(name: str) -> dict[str, np.ndarray]:
    with safe_open(GOLDEN / f"{name}.safetensors", framework="numpy") as file:
        metadata = file.metadata()
        assert metadata["schema"] == make_golden.SCHEMA, f"run: {make_golden.COMMAND}"
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)


def stages(model: FastVLM, pixels: mx.array) -> dict[str, mx.array]:
    """Outputs of the tower's parts in order, and of the projector."""
    x = model.vision_tower.stem(pixels)
    outputs = {"stem": whole(x)}
    for i, stage in enumerate(model.vision_tower.stages):
        x = stage(x)
        outputs[f"stages.{i}"] = whole(x)
    outputs["final_conv"] = model.vision_tower.final_conv(x)
    outputs["projector"] = model.encode_image(pixels)
    return outputs


def assert_close(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> None:
    """Compare by name in order of computation; the message names the first to diverge."""
    order = [name for name in ours if name in theirs]
    errors = {name: relative_error(ours[name].astype(mx.float32), theirs[name]) for name in order}
    assert set(order) == set(theirs)
    bad = {name: error for name, error in errors.items() if error >= tolerance}
    assert not bad, f"first to differ: {next(iter(bad))}; {bad}"


def all_outputs(model: FastVLM) -> dict[str, mx.array]:
    pixels = mx.array(make_golden.pixels())
    outputs = stages(model, pixels)
    ids = mx.array([make_golden.IDS])
    x = model.embed(ids, outputs["projector"])
    for i, layer in enumerate(model.language_model.layers):
        x = outputs[f"layers.{i}"] = layer(x, "causal", None)
    outputs["logits"] = model(ids, pixels=pixels)
    return outputs


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[FastVLM, Processor]:
    return load(synthetic.write_layout(tmp_path_factory.mktemp("tiny"), "llava_qwen2"))


def test_every_stage_equals_pytorch(tiny: tuple[FastVLM, Processor]) -> None:
    assert_close(all_outputs(tiny[0]), golden("fastvlm_tiny"), STAGE_FLOAT32)


def test_multi_branch_tower_equals_pytorch(tmp_path: Path) -> None:
    model, _ = load(synthetic.write_layout(tmp_path, "llava_qwen2", unfused=True))
    ours = stages(model, mx.array(make_golden.pixels()))
    del ours["projector"]
    assert_close(ours, golden("fastvit_unfused_tiny"), FOLD_FLOAT32)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", FLOAT16), ("bfloat16", BFLOAT16)])
def test_half_precision_is_close_to_pytorch(tmp_path: Path, dtype: str, tolerance: float) -> None:
    model, _ = load(synthetic.write_layout(tmp_path, "llava_qwen2"), dtype=dtype)
    assert_close(all_outputs(model), golden("fastvlm_tiny"), tolerance)


def test_decoder_equals_mlx_lm(tiny: tuple[FastVLM, Processor], restore_file_limit: None) -> None:
    from mlx_lm.models import qwen2

    text = synthetic.apple_config()
    args = qwen2.ModelArgs.from_dict({**text, "model_type": "qwen2"})
    theirs = qwen2.Model(args)
    tensors = synthetic.apple_tensors()
    weights = [
        (key, mx.array(value))
        for key, value in tensors.items()
        if key.startswith("model.") and "tower" not in key and "projector" not in key
    ]
    theirs.load_weights(weights, strict=True)
    ids = mx.array([[1, 2, 3, 4, 50, 260]])
    assert relative_error(tiny[0](ids), theirs(ids)) < STAGE_FLOAT32


@pytest.mark.parametrize("kind", ["ours", "KVCache", "RotatingKVCache"])
def test_mlx_lm_generates_with_our_model(
    tiny: tuple[FastVLM, Processor], restore_file_limit: None, kind: str
) -> None:
    """mlx-lm's loop and caches run on the model unchanged, image embeddings included."""
    from mlx_lm.generate import generate_step
    from mlx_lm.models import cache as theirs

    model, processor = tiny
    image = np.full((40, 50, 3), 200, np.uint8)
    inputs = processor("a", [image])
    assert inputs.pixels is not None
    caches = {
        "ours": model.make_cache,
        "KVCache": lambda: [theirs.KVCache() for _ in model.layers],
        "RotatingKVCache": lambda: [theirs.RotatingKVCache(max_size=512) for _ in model.layers],
    }
    steps = generate_step(
        inputs.input_ids,
        model,
        max_tokens=8,
        prompt_cache=caches[kind](),
        input_embeddings=model.embed(inputs.input_ids[None], model.encode_image(inputs.pixels))[0],
        prefill_step_size=32,
        sampler=lambda x: mx.argmax(x[:, : processor.tokenizer.size], axis=-1),
    )
    tokens = [int(token) for token, _ in steps]
    answer = generate(model, processor, "a", image, max_tokens=8)
    assert tokens[: len(answer.token_ids)] == answer.token_ids


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_cache(bits: int, tiny: tuple[FastVLM, Processor]) -> None:
    """The cache returns the quantised values, however they were appended, and takes less memory."""
    mx.random.seed(0)
    keys, values = mx.random.normal((2, 1, 2, 300, 64))
    cache, floats = QuantizedKVCache(10, bits, 32), KVCache(10)
    for start, end in ((0, 7), (7, 8), (8, 290), (290, 300)):
        new = keys[:, :, start:end], values[:, :, start:end]
        got = cache.update_and_fetch(*new)
        floats.update_and_fetch(*new)
    quantization = {"group_size": 32, "bits": bits}
    for original, returned in zip((keys, values), got, strict=True):
        assert mx.array_equal(
            returned, mx.dequantize(*mx.quantize(original, **quantization), **quantization)
        )
    assert cache.trim(5) == 5 and cache.size() == 295 and not cache.empty()
    assert cache.nbytes < floats.nbytes / 2
    with pytest.raises(ConfigError, match="kv_bits is 3"):
        tiny[0].make_cache(bits=3)


def test_decoder_runs_with_quantized_cache_of_mlx_lm(restore_file_limit: None) -> None:
    from mlx_lm.models.cache import QuantizedKVCache

    config = Qwen2Config(128, 2, 4, 2, 96, 300, 1e-6, 1e6, 4096, True)
    mx.random.seed(0)
    model = Qwen2(config)
    ids = mx.array([[7, 8, 9, 10, 11, 12]])
    cache: list[Any] = [QuantizedKVCache(group_size=32, bits=8) for _ in model.layers]
    prefill = model(ids[:, :4], cache)
    steps = [model(ids[:, i : i + 1], cache) for i in (4, 5)]
    assert relative_error(mx.concatenate([prefill, *steps], 1), model(ids)) < KV_8BIT


def test_cache_grows_and_trims_without_changing_a_value() -> None:
    cache = KVCache(capacity=10)
    keys = mx.random.normal((1, 2, 700, 4))
    for start, stop in ((0, 3), (3, 300), (300, 301), (301, 700)):
        k, v = cache.update_and_fetch(keys[:, :, start:stop], -keys[:, :, start:stop])
        assert mx.array_equal(k, keys[:, :, :stop]) and mx.array_equal(v, -keys[:, :, :stop])
    assert cache.trim(600) == 600 and cache.size() == 100
    k, _ = cache.update_and_fetch(keys[:, :, :5], keys[:, :, :5])
    assert mx.array_equal(k, mx.concatenate([keys[:, :, :100], keys[:, :, :5]], axis=2))
    assert cache.trim(1000) == 105


def test_another_thread_can_use_the_model(tiny: tuple[FastVLM, Processor]) -> None:
    model, processor = tiny
    image = np.full((40, 50, 3), 99, np.uint8)
    here = generate(model, processor, "a", image, max_tokens=6)
    there: list[Any] = []

    def work() -> None:
        there.append(generate(model, processor, "a", image, max_tokens=6))

    for _ in range(2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert [answer.token_ids for answer in there] == [here.token_ids] * 2


def test_model_loaded_in_another_thread_works(tmp_path: Path) -> None:
    synthetic.write_layout(tmp_path, "fast_vlm")
    loaded: list[Any] = []
    thread = threading.Thread(target=lambda: loaded.append(load(tmp_path)))
    thread.start()
    thread.join()
    assert generate(*loaded[0], "a", max_tokens=3).stats.generation_tokens == 3


def contrasting_pixels() -> mx.array:
    """Two images that give different outputs even with random weights."""
    return mx.array(10_000 * make_golden.pixels())


def test_images_keep_their_order(tiny: tuple[FastVLM, Processor]) -> None:
    """Images in reverse order give their embeddings in reverse order."""
    model, _ = tiny
    pixels = contrasting_pixels()
    ids = mx.array([make_golden.IDS])
    there = np.array(model.embed(ids, model.encode_image(pixels)))
    back = np.array(model.embed(ids, model.encode_image(pixels[::-1])))
    assert relative_error(there[:, 3:7], back[:, 9:13]) < BATCHED
    assert relative_error(there[:, 9:13], back[:, 3:7]) < BATCHED
    assert relative_error(there[:, 3:7], there[:, 9:13]) > 1000 * BATCHED
    assert np.array_equal(there[:, 7:9], back[:, 7:9])


def test_batch_equals_its_rows(tiny: tuple[FastVLM, Processor]) -> None:
    model, _ = tiny
    pixels = contrasting_pixels()
    row = [1, *[IMAGE_TOKEN] * 4, 2, 3]
    both = model(mx.array([row, row]), pixels=pixels)
    for i in range(2):
        alone = model(mx.array([row]), pixels=pixels[i : i + 1])
        assert relative_error(both[i : i + 1], alone) < BATCHED
        assert relative_error(both[1 - i : 2 - i], alone) > 1000 * BATCHED


def test_last_only_equals_the_last_row(tiny: tuple[FastVLM, Processor]) -> None:
    ids = mx.array([[1, 2, 3]])
    last = tiny[0](ids, last_only=True)
    assert relative_error(last, tiny[0](ids)[:, -1:]) < SAME_WEIGHTS


@pytest.mark.parametrize(
    ("ids", "images"),
    [([1, IMAGE_TOKEN], 0), ([1, 2], 1), ([IMAGE_TOKEN] * 3, 1), ([1, 384], 0), ([1, -1], 0)],
)
def test_wrong_ids_are_refused(
    tiny: tuple[FastVLM, Processor], ids: list[int], images: int
) -> None:
    pixels = mx.array(make_golden.pixels())[:images] if images else None
    with pytest.raises(PromptError):
        tiny[0](mx.array([ids]), pixels=pixels)


@pytest.mark.parametrize("shape", [(1, 100, 128, 3), (128, 128, 3), (1, 128, 128, 4)])
def test_wrong_pixels_are_refused(tiny: tuple[FastVLM, Processor], shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageError, match="multiple of 64"):
        tiny[0].encode_image(mx.zeros(shape))


@pytest.mark.parametrize(
    ("projector_type", "depth"),
    [("identity", 0), ("linear", 1), ("mlp1x_gelu", 1), ("mlp3x_gelu", 3), ("mlp9x_gelu", -1)],
)
def test_projector_depth_by_type(projector_type: str, depth: int) -> None:
    assert projector_depth(projector_type) == depth


@pytest.mark.parametrize("projector_type", ["identity", "linear", "mlp3x_gelu"])
def test_each_projector_loads_and_equals_its_formula(tmp_path: Path, projector_type: str) -> None:
    tensors = synthetic.apple_tensors()
    width = 256 if projector_type == "identity" else 64
    tensors = {k: v for k, v in tensors.items() if "mm_projector" not in k}
    names = {
        "identity": [],
        "linear": ["model.mm_projector"],
        "mlp3x_gelu": [f"model.mm_projector.{i}" for i in (0, 2, 4)],
    }[projector_type]
    for i, name in enumerate(names):
        inputs = 256 if i == 0 else width
        tensors[f"{name}.weight"] = synthetic.tensor(f"{name}.weight", (width, inputs))
        tensors[f"{name}.bias"] = synthetic.tensor(f"{name}.bias", (width,))
    changes: dict[str, Any] = {"mm_projector_type": projector_type}
    if projector_type == "identity":
        tensors = {
            k: synthetic.tensor(k, tuple({64: 256, 32: 128}.get(n, n) for n in v.shape))
            if not k.startswith(synthetic.TOWER)
            else v
            for k, v in tensors.items()
        }
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        changes["hidden_size"] = 256
    model, _ = load(synthetic.write(tmp_path, tensors, synthetic.apple_config(**changes)))
    pixels = mx.array(make_golden.pixels())
    x = model.vision_tower(pixels).reshape(2, -1, 256)
    for i, name in enumerate(names):
        x = mx.array(tensors[f"{name}.bias"]) + (
            (x if i == 0 else x * (1 + mx.erf(x / 2**0.5)) / 2)
            @ mx.array(tensors[f"{name}.weight"]).T
        )
    assert relative_error(model.encode_image(pixels), x) < FOLD_FLOAT32
