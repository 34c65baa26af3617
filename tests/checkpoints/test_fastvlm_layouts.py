"""Every layout of FastVLM checkpoints, by its tensors and by its full-size key listing."""

import json
from contextlib import nullcontext
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import synthetic

from mlx_fastvlm import CheckpointError, ConfigError, FastVLM, generate, load
from mlx_fastvlm.checkpoints import fastvlm
from mlx_fastvlm.loader import read_canonical
from mlx_fastvlm.models.config import FastVLMConfig
from mlx_mobileclip.checkpoints.hub import Checkpoint
from mlx_mobileclip.checkpoints.weights import named_parameters

LAYOUTS = ("llava_qwen2", "fast_vlm", "mlx-vlm")


def canonical(path: Path, **options: Any) -> tuple[FastVLMConfig, dict[str, mx.array]]:
    return read_canonical(Checkpoint(path, path.name), **options)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, mx.array]:
    return canonical(synthetic.write_layout(tmp_path_factory.mktemp("a"), "llava_qwen2"))[1]


def assert_same(tensors: dict[str, mx.array], expected: dict[str, mx.array]) -> None:
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert mx.array_equal(tensors[name], value).item(), name


@pytest.mark.parametrize("options", [{}, {"shards": 3}, {"split_tokenizer": True}])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_hold_the_same_model(
    layout: str, options: dict[str, Any], expected: dict[str, mx.array], tmp_path: Path
) -> None:
    path = synthetic.write_layout(tmp_path, layout, **options)
    config, tensors = canonical(path)
    assert_same(tensors, expected)
    assert config.source["layout"] == layout
    _, processor = load(path)
    assert processor.tokenizer.added["<|im_end|>"] == 266


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision_files_hold_the_same_model(
    layout: str, dtype: str, expected: dict[str, mx.array], tmp_path: Path
) -> None:
    _, tensors = canonical(synthetic.write_layout(tmp_path, layout, dtype=getattr(mx, dtype)))
    for name, value in expected.items():
        assert mx.allclose(tensors[name].astype(mx.float32), value, rtol=2e-2, atol=2e-2), name


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_row_contiguous(layout: str, dtype: str, tmp_path: Path) -> None:
    """Strides of axes of size one count too: cuDNN chooses its algorithm by them."""
    model, _ = load(synthetic.write_layout(tmp_path, layout), dtype=dtype)
    for name, value in named_parameters(model).items():
        strides = [value.itemsize * prod(value.shape[i + 1 :]) for i in range(value.ndim)]
        assert list(memoryview(value).strides or ()) == strides, name


def test_transformers_4_names_are_read(expected: dict[str, mx.array], tmp_path: Path) -> None:
    tensors = synthetic.renamed(synthetic.apple_tensors(), synthetic.transformers_name)
    old = {
        key.replace("model.language_model.", "language_model.model.")
        .replace("lm_head.", "language_model.lm_head.")
        .replace("model.vision_tower.", "vision_tower.")
        .replace("model.multi_modal_projector.", "multi_modal_projector."): value
        for key, value in tensors.items()
    }
    synthetic.write(tmp_path, old, synthetic.transformers_config())
    assert_same(canonical(tmp_path)[1], expected)


def test_peft_prefix_is_removed(expected: dict[str, mx.array], tmp_path: Path) -> None:
    wrapped = {f"base_model.model.{k}": v for k, v in synthetic.apple_tensors().items()}
    synthetic.write(tmp_path, wrapped, synthetic.apple_config())
    assert_same(canonical(tmp_path)[1], expected)


def test_app_export_needs_vision_from(expected: dict[str, mx.array], tmp_path: Path) -> None:
    export = synthetic.write_layout(tmp_path / "export", "app export")
    with pytest.raises(CheckpointError, match=r"no image tower.*--vision-from"):
        load(export)
    with pytest.raises(CheckpointError, match="has no image tower"):
        load(export, vision_from=export)
    for layout in LAYOUTS:
        original = synthetic.write_layout(tmp_path / layout, layout)
        config, tensors = canonical(export, vision_from=original)
        head = tensors.pop("language_model.lm_head.weight")
        assert_same(tensors, expected)
        assert head.shape == expected["language_model.embed_tokens.weight"].shape
        assert config.source["vision_from"] == str(original)
    with pytest.raises(CheckpointError, match="already has an image tower"):
        load(original, vision_from=original)


# Full-size listings: no name is missing or left over, and all shapes match.


def listing(name: str, dtype: mx.Dtype = mx.bfloat16) -> dict[str, mx.array]:
    """Lazy zeros for a listing; a module with scales has quantised weights."""
    shapes = synthetic.read_keys(name)
    zero = mx.array(0.0, dtype)
    return {
        key: mx.broadcast_to(
            mx.array(0, mx.uint32) if key.removesuffix("weight") + "scales" in shapes else zero,
            shape,
        )
        for key, shape in shapes.items()
    }


def convert_listing(
    monkeypatch: pytest.MonkeyPatch, tensors: dict[str, mx.array], config: dict[str, Any]
) -> tuple[FastVLMConfig, dict[str, mx.array]]:
    monkeypatch.setattr(fastvlm, "read_tensors", lambda _: dict(tensors))
    return fastvlm.read_foreign(Checkpoint(Path("listing"), "listing"), config)


def assert_matches_model(config: FastVLMConfig, tensors: dict[str, mx.array]) -> None:
    model = named_parameters(FastVLM(config))
    assert {k: v.shape for k, v in tensors.items()} == {k: v.shape for k, v in model.items()}


@pytest.mark.parametrize("size", ["0.5b", "1.5b", "7b"])
@pytest.mark.parametrize("layout", ["apple_llava_qwen2", "transformers_fast_vlm", "mlxvlm_fastvlm"])
def test_full_size_listings(monkeypatch: pytest.MonkeyPatch, layout: str, size: str) -> None:
    tensors = listing(f"{layout}_{size}")
    if layout == "transformers_fast_vlm":
        config = synthetic.transformers_config(size)
        rows = tensors["model.language_model.embed_tokens.weight"].shape[0]
        assert rows in fastvlm.PADDED_VOCABULARIES
        config["text_config"]["vocab_size"] = rows
    else:
        config = synthetic.apple_config(size, image_size=1024, vision_config={})
    result, converted = convert_listing(monkeypatch, tensors, config)
    assert_matches_model(result, converted)
    assert result.text.vocab_size == (152064 if size == "7b" else 151936)
    assert result.text.tie_word_embeddings is (size != "7b")


def test_unfused_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = listing("apple_llava_qwen2_0.5b")
    tensors = {k: v for k, v in tensors.items() if not k.startswith(synthetic.TOWER)}
    tensors |= {synthetic.TOWER + k: v for k, v in listing("fastvithd_apple_unfused").items()}
    assert_matches_model(
        *convert_listing(monkeypatch, tensors, synthetic.apple_config("0.5b", 1024))
    )


@pytest.mark.parametrize(
    ("name", "size", "bits"),
    [
        ("apple_app_export_0.5b_fp16", "0.5b", None),
        ("apple_app_export_1.5b_q8", "1.5b", 8),
        ("apple_app_export_7b_q4", "7b", 4),
    ],
)
def test_app_export_listings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, size: str, bits: int | None
) -> None:
    """App exports are read with the image tower of the original checkpoint."""
    config = synthetic.apple_config(size, 1024, tie_word_embeddings=False, vision_config={})
    if bits:
        config["quantization"] = {"group_size": 64, "bits": bits}
    original = tmp_path / "original"
    original.mkdir()
    (original / "config.json").write_text(json.dumps(synthetic.apple_config(size, 1024)))
    files = {
        "export": listing(name, mx.float16),
        "original": listing(f"apple_llava_qwen2_{size}"),
    }
    monkeypatch.setattr(fastvlm, "read_tensors", lambda path: dict(files[path.name]))
    export = Checkpoint(Path("export"), "export")
    result, tensors = fastvlm.read_foreign(export, config, Checkpoint(original, "original"))
    assert_matches_model(result, tensors)
    assert len(result.quantization) == (0 if bits is None else 28 * 4 + 2 + 2)


# Errors name the tensor or field.


def write_changed(path: Path, change: dict[str, Any], **config: Any) -> Path:
    tensors = synthetic.apple_tensors() | change
    tensors = {k: v for k, v in tensors.items() if v is not None}
    return synthetic.write(path, tensors, synthetic.apple_config(**config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.1.mlp.up_proj.weight": None}, "1 missing: model.layers.1.mlp.up_proj"),
        (
            {synthetic.TOWER + "network.10.1.convffn.conv.bn.running_var": None},
            r"1 missing: .*network\.10\.1\.convffn\.conv\.bn\.running_var",
        ),
        ({"model.surprise": np.zeros(3)}, "1 with no place in the model: model.surprise"),
        ({"model.norm.weight": np.ones(65)}, r"model.norm.weight has shape \(65,\) instead of"),
        ({"model.mm_projector.0.bias": None, "x": np.zeros(1)}, "1 missing.*1 with no place"),
    ],
)
def test_wrong_tensors_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(write_changed(tmp_path, change))


def test_step_counters_and_clip_head_are_ignored(tmp_path: Path) -> None:
    extra = {
        synthetic.TOWER + "network.0.0.convffn.conv.bn.num_batches_tracked": mx.array(7, mx.int64)
    }
    load(write_changed(tmp_path, extra))
    assert any(key.endswith("head.proj") for key in synthetic.apple_tensors())


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    synthetic.write(tmp_path, {"a.b": np.zeros(2)}, synthetic.apple_config())
    with pytest.raises(CheckpointError, match="no known FastVLM layout; known are llava_qwen2"):
        load(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_the_config_decides_whether_lm_head_is_used(tied: bool, tmp_path: Path) -> None:
    tensors = synthetic.apple_tensors(lm_head="differs")
    path = synthetic.write(tmp_path, tensors, synthetic.apple_config(tie_word_embeddings=tied))
    differs = pytest.warns(UserWarning, match="lm_head differs from embed_tokens")
    with differs if tied else nullcontext():
        model, _ = load(path)
    assert ("lm_head" in model.language_model.children()) is (not tied)


def test_tied_copy_of_lm_head_is_dropped_silently(tmp_path: Path) -> None:
    load(synthetic.write_layout(tmp_path, "llava_qwen2"))  # warnings are errors in the tests


def test_untied_without_lm_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"1 missing: lm_head\.weight"):
        load(write_changed(tmp_path, {"lm_head.weight": None}, tie_word_embeddings=False))


def test_vocabulary_padding_is_removed(
    monkeypatch: pytest.MonkeyPatch, expected: dict[str, mx.array], tmp_path: Path
) -> None:
    monkeypatch.setattr(fastvlm, "PADDED_VOCABULARIES", {448: 384})
    tensors = synthetic.renamed(synthetic.apple_tensors(), synthetic.transformers_name)
    name = "model.language_model.embed_tokens.weight"
    tensors[name] = np.concatenate([tensors[name], np.ones((64, 64), np.float32)])
    del tensors["lm_head.weight"]
    config = synthetic.transformers_config()
    config["text_config"]["vocab_size"] = 448
    assert_same(canonical(synthetic.write(tmp_path, tensors, config))[1], expected)


# Quantised weights.

QUANTIZATION = {"group_size": 32, "bits": 8}


def dequantized(tensors: dict[str, Any], settings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Float weights with exactly the values of the quantised ones."""
    result = {}
    for key, value in tensors.items():
        base = key.removesuffix(".weight")
        if f"{base}.scales" in tensors and key.endswith(".weight"):
            parts = value, tensors[f"{base}.scales"], tensors.get(f"{base}.biases")
            result[key] = np.array(mx.dequantize(*parts, **settings[base]))
        elif not key.endswith((".scales", ".biases")):
            result[key] = value
    return result


@pytest.mark.parametrize("layout", ["mlx-vlm", "app export"])
@pytest.mark.parametrize("mixed", [False, True])
def test_quantized_checkpoints_equal_their_float_values(
    layout: str, mixed: bool, tmp_path: Path
) -> None:
    """This includes v_proj quantised unlike q and k, as in mlx-lm's mixed recipes."""
    name = synthetic.mlx_vlm_name if layout == "mlx-vlm" else synthetic.app_export_name
    floats = synthetic.renamed(synthetic.apple_tensors(), name)
    floats = {k: synthetic.mlx_layout(k, v) for k, v in floats.items()}
    if layout == "mlx-vlm":
        del floats["language_model.lm_head.weight"]
    settings: dict[str, dict[str, Any]] = {}

    def quantize(key: str) -> dict[str, Any] | None:
        if not key.startswith(("language_model", "mm_projector", "multi_modal_projector")):
            return None
        bits = 4 if mixed and "v_proj" in key else 8
        settings[key.removesuffix(".weight")] = {"group_size": 32, "bits": bits}
        return settings[key.removesuffix(".weight")]

    tensors = synthetic.quantized(floats, quantize)
    overrides = {k: v for k, v in settings.items() if v != QUANTIZATION}
    quantization = {**QUANTIZATION, "mode": "affine", **overrides, "vision_tower": False}
    config = synthetic.apple_config(
        tie_word_embeddings=layout == "mlx-vlm",
        quantization=quantization,
        quantization_config=quantization,
    )
    vision_from = None
    if layout == "app export":
        vision_from = synthetic.write_layout(tmp_path / "original", "llava_qwen2")
    path = synthetic.write(tmp_path / "quantized", tensors, config)
    model, processor = load(path, vision_from=vision_from)
    plain = dequantized(tensors, settings)
    plain_config = {k: v for k, v in config.items() if not k.startswith("quantization")}
    path = synthetic.write(tmp_path / "plain", plain, plain_config)
    reference, _ = load(path, vision_from=vision_from)
    image = np.full((30, 40, 3), 77, np.uint8)
    inputs = processor("in the", [image])
    ours = model(inputs.input_ids[None], pixels=inputs.pixels)
    theirs = reference(inputs.input_ids[None], pixels=inputs.pixels)
    assert mx.abs(ours - theirs).max().item() < 1e-4 * mx.abs(theirs).max().item()
    assert generate(model, processor, "a", image, max_tokens=4).token_ids
    fused = "language_model.layers.0.self_attn.qkv_proj"
    assert (fused in model.config.quantization) is (not mixed)


def test_scales_without_a_quantization_entry_are_refused(tmp_path: Path) -> None:
    floats = synthetic.renamed(synthetic.apple_tensors(), synthetic.app_export_name)
    tensors = synthetic.quantized(floats, lambda key: QUANTIZATION)
    path = synthetic.write(tmp_path / "x", tensors, synthetic.apple_config())
    original = synthetic.write_layout(tmp_path / "original", "llava_qwen2")
    with pytest.raises(CheckpointError, match="does not say how it is quantised"):
        load(path, vision_from=original)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "'llama' is not a FastVLM"),
        ({"model_file": "x.py"}, "code of a checkpoint is never run"),
        ({"mm_vision_tower": "openai/clip-vit"}, "is not FastViTHD"),
        ({"mm_vision_tower": "mobileclip_l_1000"}, "image_size"),
        ({"mm_projector_type": "mlp99x_gelu"}, "projector_type"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_attention_heads": 7}, "hidden_size: cannot be split"),
        ({"vocab_size": 100}, "has shape"),
    ],
)
def test_unsupported_configs_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((ConfigError, CheckpointError), match=message):
        load(write_changed(tmp_path, {}, **changes))


def test_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path: Path) -> None:
    path = synthetic.write_layout(tmp_path, "llava_qwen2")
    synthetic.write_tokenizer(path, size=1000)
    with pytest.raises(ConfigError, match="its files belong to different models"):
        load(path)
