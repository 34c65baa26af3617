"""Fields in the JSON files of a MobileCLIP source are honoured, or refused by name."""

import json
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic_clip
from synthetic_clip import tiny_config, tiny_shapes, values

from mlx_mobileclip import CheckpointError, ConfigError, load
from mlx_mobileclip.checkpoints import mobileclip
from mlx_mobileclip.checkpoints.hub import is_repository, resolve_file
from mlx_mobileclip.models.clip import PreprocessConfig
from mlx_mobileclip.models.text import TextConfig
from mlx_mobileclip.models.variants import OPENAI, PLAIN, TOWERS, VARIANTS

S0 = "MobileCLIP2-S0"
OURS = PreprocessConfig(64, "bicubic", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    small = {name: tiny_config(name) for name in VARIANTS}
    monkeypatch.setattr(mobileclip, "VARIANTS", small)
    yield


def open_clip_config(variant: str, tower: str) -> dict[str, Any]:
    """open_clip's complete config for the tiny model."""
    config = tiny_config(variant)
    text = config.text
    assert text is not None
    return {
        "model_cfg": {
            "embed_dim": config.embed_dim,
            "vision_cfg": {
                "timm_model_name": tower,
                "timm_model_pretrained": False,
                "timm_pool": "token" if tower.startswith("vit") else "avg",
                "timm_proj": None,
                "timm_drop": 0.0,
                "timm_drop_path": 0.1,
                "image_size": config.preprocess.image_size,
            },
            "text_cfg": {
                "context_length": 77,
                "vocab_size": 49408,
                "width": text.width,
                "heads": text.heads,
                "layers": text.layers,
                "no_causal_mask": not text.causal,
            },
            "custom_text": True,
        },
        "preprocess_cfg": {
            "mean": list(config.preprocess.mean),
            "std": list(config.preprocess.std),
            "interpolation": config.preprocess.interpolation,
            "resize_mode": "shortest",
        },
    }


def write_source(folder: Path, config: dict[str, Any], variant: str = S0, **files: Any) -> Path:
    name = files.get("name", "open_clip_model.safetensors")
    tensors = files.get("tensors") or values(tiny_shapes(variant, "open_clip"))
    synthetic_clip.write(folder / name, tensors)
    (folder / files.get("config_name", "open_clip_config.json")).write_text(json.dumps(config))
    return folder


def text_of(config: Any) -> TextConfig:
    assert config.text is not None
    found: TextConfig = config.text
    return found


@pytest.mark.parametrize(
    "tower", [tower for tower in TOWERS if "_" in tower and tower != "vit_b16"]
)
def test_complete_config_needs_no_variant(tower: str, tmp_path: Path) -> None:
    variant = TOWERS[tower]
    folder = write_source(tmp_path / "ft", open_clip_config(variant, tower), variant)
    found = load(folder)[0].config
    assert replace(found, source={}) == tiny_config(variant)
    single = load(folder / "open_clip_model.safetensors")[0].config
    assert replace(single, source={}) == tiny_config(variant)


def test_stated_sizes_are_honoured(tmp_path: Path) -> None:
    config = open_clip_config(S0, "fastvit_mci0")
    tensors = values(tiny_shapes(S0, "open_clip"))
    tensors["text.positional_embedding"] = tensors["text.positional_embedding"][:20].copy()
    embedding = tensors["text.token_embedding.weight"]
    tensors["text.token_embedding.weight"] = np.concatenate([embedding, embedding[:8]])
    config["model_cfg"]["text_cfg"] |= {"context_length": 20, "vocab_size": 49416, "heads": 4}
    config["model_cfg"]["vision_cfg"]["image_size"] = [96, 96]
    folder = write_source(tmp_path / "ft", config, tensors=tensors)
    (folder / "merges.txt").write_text("#version: 0.2\ni n\n")  # as Hugging Face writes CLIP's
    model, processor = load(folder)
    text = text_of(model.config)
    assert (text.heads, text.context_length, text.vocab_size) == (4, 20, 49416)
    assert processor.preprocess.image_size == 96
    assert model.encode_text(processor.texts(["a cat"])).shape == (1, 32)


def test_text_tower_at_the_root_is_read(tmp_path: Path) -> None:
    config = open_clip_config(S0, "fastvit_mci0")
    config["model_cfg"]["custom_text"] = False
    tensors = values(tiny_shapes(S0, "open_clip"))
    root = {key.removeprefix("text."): value for key, value in tensors.items()}
    a = load(write_source(tmp_path / "a", open_clip_config(S0, "fastvit_mci0"), tensors=tensors))
    b = load(write_source(tmp_path / "b", config, tensors=root))
    ids = a[1].texts(["a cat"])
    assert np.array_equal(a[0].encode_text(ids), b[0].encode_text(ids))


@pytest.mark.parametrize("prefix", ["clip.", "student.", "base_model.model.", "module._orig_mod."])
@pytest.mark.parametrize("layout", ["apple", "open_clip", "timm"])
def test_common_prefix_is_removed(prefix: str, layout: str, tmp_path: Path) -> None:
    variant = "MobileCLIP-S1"
    tensors = {prefix + k: v for k, v in values(tiny_shapes(variant, layout)).items()}
    tensors["n_averaged"] = np.array(7, np.int64)
    path = synthetic_clip.write(tmp_path / "ft.pth", tensors)
    assert load(path, variant=variant)[0].config.variant == variant


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("", "quick_gelu", True),
        ("", "init_logit_bias", -10),
        ("", "multimodal_cfg", {}),
        ("", "surprise", 1),
        ("text_cfg", "pool_type", "last"),
        ("text_cfg", "act_kwargs", {"approximate": "tanh"}),
        ("text_cfg", "norm_kwargs", {"eps": 1e-3}),
        ("text_cfg", "tokenizer_kwargs", {"clean": "canonicalize"}),
        ("text_cfg", "hf_tokenizer_name", "bert-base-uncased"),
        ("text_cfg", "mlp_ratio", 2.0),
        ("text_cfg", "proj_type", "none"),
        ("text_cfg", "qk_norm", True),
        ("text_cfg", "context_length", 1 << 20),
        ("text_cfg", "heads", 5),
        ("text_cfg", "surprise\n", 1),
        ("vision_cfg", "timm_model_name", "fastvit_t8"),
        ("vision_cfg", "timm_model_name", "fastvit_mci3"),
        ("vision_cfg", "timm_model_name", None),
        ("vision_cfg", "timm_pool", "max"),
        ("vision_cfg", "timm_proj", "linear"),
        ("vision_cfg", "image_size", [64, 32]),
        ("vision_cfg", "surprise", None),
        ("preprocess_cfg", "resize_mode", "squash"),
        ("preprocess_cfg", "interpolation", "nearest"),
        ("preprocess_cfg", "size", 32),
        ("preprocess_cfg", "mode", "BGR"),
        ("preprocess_cfg", "surprise", 1),
    ],
)
def test_unsupported_fields_are_refused_by_name(
    section: str, key: str, value: Any, tmp_path: Path
) -> None:
    config = open_clip_config(S0, "fastvit_mci0")
    parent = config if section == "preprocess_cfg" else config["model_cfg"]
    (parent[section] if section else parent)[key] = value
    with pytest.raises(ConfigError) as caught:
        load(write_source(tmp_path / "ft", config), variant=S0)
    assert key.strip() in str(caught.value) and section in str(caught.value)
    assert "\n" not in str(caught.value)


def test_apple_b_and_its_open_clip_port_are_distinguished(tmp_path: Path) -> None:
    config = open_clip_config("MobileCLIP2-B", "vit_base_mci_224")
    folder = write_source(tmp_path / "ft", config, "MobileCLIP-B")
    with pytest.raises(ConfigError, match=r"timm_model_name.*MobileCLIP-B:open_clip"):
        load(folder, variant="MobileCLIP-B")
    assert load(folder, variant="MobileCLIP-B:open_clip")[0].config.image.stem_padding == 0
    published = write_source(tmp_path / "MobileCLIP-B-OpenCLIP", config, "MobileCLIP-B")
    for path in (published, published / "open_clip_model.safetensors"):
        found = load(path)[0].config
        assert (found.variant, found.image.stem_padding) == ("MobileCLIP-B", 1)


def test_missing_fields_have_the_defaults_of_open_clip(tmp_path: Path) -> None:
    config = open_clip_config(S0, "fastvit_mci0")
    del config["preprocess_cfg"]["interpolation"]
    found = load(write_source(tmp_path / "a", config))[1].preprocess
    assert (found.interpolation, found.mean) == ("bicubic", PLAIN[0])
    del config["preprocess_cfg"]
    found = load(write_source(tmp_path / "b", config))[1].preprocess
    assert (found.interpolation, found.mean) == ("bicubic", OPENAI[0])
    bare = config["model_cfg"]  # as Apple's repositories have it: nothing about preprocessing
    found = load(write_source(tmp_path / "c", bare, config_name="config.json"))[1].preprocess
    assert (found.interpolation, found.mean) == ("bilinear", PLAIN[0])


def apple_config() -> dict[str, Any]:
    text = {"context_length": 77, "vocab_size": 49408, "dim": 32, "ffn_multiplier_per_layer": 4.0}
    text |= {
        "n_heads_per_layer": [2, 2],
        "n_transformer_layers": 2,
        "norm_layer": "layer_norm_fp32",
    }
    text |= {"causal_masking": False, "model_name": "mct"}
    image = {"image_size": 96, "model_name": "mci0"}
    return {"embed_dim": 32, "image_cfg": image, "text_cfg": text}


def test_apple_config_is_honoured(tmp_path: Path) -> None:
    tensors = values(tiny_shapes("MobileCLIP-S0", "apple"))
    options = {"tensors": tensors, "name": "epoch_3.pt", "config_name": "config.json"}
    folder = write_source(tmp_path / "ft", apple_config(), **options)
    found = load(folder / "epoch_3.pt")[0].config
    assert (found.variant, found.preprocess.image_size) == ("MobileCLIP-S0", 96)
    for key, value in (
        ("ffn_multiplier_per_layer", [4, 2]),
        ("n_heads_per_layer", [2, 4]),
        ("norm_layer", "batch_norm"),
        ("no_pos_embedding", True),
        ("model_name", "other"),
    ):
        config = apple_config()
        config["text_cfg"][key] = value
        with pytest.raises(ConfigError, match=key):
            load(write_source(tmp_path / "ft", config, **options))


def timm_config(**changes: Any) -> dict[str, Any]:
    given = {"tag": "x", "custom_load": False, "input_size": [3, 64, 64], "crop_pct": 0.95}
    given |= {"interpolation": "bicubic", "mean": [0, 0, 0], "std": [1, 1, 1], "num_classes": 512}
    given |= {"crop_mode": "center", "pool_size": [8, 8], "first_conv": ["a"], "classifier": "b"}
    result = {"architecture": "fastvit_mci0", "num_classes": 512, "num_features": 1024}
    result["pretrained_cfg"] = given | changes
    return result | {"global_pool": "avg"}


def test_timm_config_is_honoured(tmp_path: Path) -> None:
    tensors = values(tiny_shapes(S0, "timm"))
    options = {"tensors": tensors, "config_name": "config.json", "name": "model.safetensors"}
    found = load(write_source(tmp_path / "ft", timm_config(), **options))[0].config
    assert found.variant == S0 and found.preprocess == tiny_config(S0).preprocess
    written = timm_config() | {
        "model_args": {"in_chans": 3, "num_classes": 512, "global_pool": "avg"}
    }
    assert load(write_source(tmp_path / "ft", written, **options))[0].config == found
    for built in ({"img_size": [96, 96]}, {"img_size": 96, "in_chans": 1}, {"img_size": [9, 8]}):
        with pytest.raises(ConfigError, match=r"img_size|in_chans"):
            load(write_source(tmp_path / "ft", timm_config() | {"model_args": built}, **options))
    stated = timm_config(mean=[0.5] * 3, input_size=[3, 96, 96], crop_pct=1.0)
    found = load(write_source(tmp_path / "ft", stated, **options))[0].config
    assert (found.preprocess.mean, found.preprocess.image_size) == ((0.5,) * 3, 96)
    for key, value in (
        ("crop_pct", 0.8),
        ("interpolation", "bilinear"),
        ("crop_mode", "squash"),
        ("input_size", [1, 64, 64]),
        ("surprise", 1),
    ):
        folder = write_source(tmp_path / "ft", timm_config(**{key: value}), **options)
        with pytest.raises(ConfigError, match=key):
            load(folder)
    folder = write_source(tmp_path / "ft", timm_config(crop_pct=0.8), **options)
    assert load(folder, preprocess=OURS)[1].preprocess == OURS
    for extra in ({"global_pool": "max"}, {"model_args": {"act_layer": "relu"}}, {"odd": 1}):
        with pytest.raises(ConfigError, match=r"global_pool|act_layer|odd"):
            load(write_source(tmp_path / "ft", timm_config() | extra, **options))


# Configs beside a single file, and configs given by the caller.


def test_config_beside_a_file_is_used(tmp_path: Path) -> None:
    config = open_clip_config(S0, "fastvit_mci0")
    config["preprocess_cfg"] |= {"mean": [0.5] * 3, "std": [0.25] * 3}
    folder = write_source(tmp_path / "run1", config, name="epoch_3.pt")
    path = folder / "epoch_3.pt"
    image = np.arange(64 * 64 * 3, dtype=np.uint32).reshape(64, 64, 3).astype(np.uint8)
    (one, prepared), (other, also) = load(path), load(folder)
    assert prepared.preprocess == also.preprocess
    pixels = prepared.images([image])
    assert np.array_equal(one.encode_image(pixels), other.encode_image(also.images([image])))
    assert load(path, preprocess=OURS)[1].preprocess == OURS
    elsewhere = tmp_path / "mine.json"
    elsewhere.write_text(json.dumps(open_clip_config(S0, "fastvit_mci0")))
    assert load(path, config=elsewhere)[1].preprocess == tiny_config(S0).preprocess
    with pytest.raises(ConfigError, match="preprocess: std"):
        load(path, preprocess=replace(OURS, std=(0.0, 1.0, 1.0)))
    with pytest.raises(ConfigError, match="cannot be read"):
        load(path, config=tmp_path / "none.json")


def test_config_of_another_model_is_refused(tmp_path: Path) -> None:
    path = synthetic_clip.write(
        tmp_path / "mobileclip2_s0.pt", values(tiny_shapes(S0, "open_clip"))
    )
    beside = tmp_path / "config.json"
    beside.write_text(json.dumps({"model_type": "llava_qwen2", "hidden_size": 896}))
    with pytest.raises(ConfigError, match="another kind of model"):
        load(path)
    assert load(path, preprocess=OURS)[1].preprocess == OURS
    beside.write_text(json.dumps({"image_cfg": {"model_name": "mci2"}}))
    with pytest.raises(ConfigError, match=r"model_name: 'mci2' is not the image tower of"):
        load(path)
    beside.write_text(json.dumps({"model_type": "mlx_mobileclip"}))
    with pytest.raises(ConfigError, match="load the directory"):
        load(path)
    beside.write_text(json.dumps({"epochs": 3}))  # does not describe a model
    assert load(path)[0].config.variant == S0


def test_preprocessing_of_a_converted_checkpoint_can_be_overridden() -> None:
    size = load("demo")[1].preprocess.image_size
    ours = replace(OURS, image_size=size)
    assert load("demo", preprocess=ours)[1].preprocess == ours


# Local names.


def test_existing_paths_are_not_repositories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network is asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    tensors = values(tiny_shapes(S0, "open_clip"))
    for name in ("checkpoints/ft.pth", "checkpoints/ft.ckpt", "checkpoints/ft.pt"):
        synthetic_clip.write(Path(name), tensors)
        assert load(name, variant=S0)[0].config.variant == S0
        Path(name).unlink()
        with pytest.raises(CheckpointError, match="no such file"):
            resolve_file(name)
    Path("checkpoints/ft.weights").write_bytes(b"x")
    Path("checkpoints/gone").symlink_to("nowhere")
    for name in ("checkpoints/ft.weights", "checkpoints/gone"):
        assert not is_repository(name)
        with pytest.raises(CheckpointError, match="give a checkpoint's file"):
            resolve_file(name)
    Path("apple/MobileCLIP-S0").mkdir(parents=True)
    assert is_repository("apple/MobileCLIP-S0")
