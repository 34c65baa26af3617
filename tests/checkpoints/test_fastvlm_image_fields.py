"""Image size and mode of a checkpoint equal those of transformers, or are refused."""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
from PIL import Image

from mlx_fastvlm import CheckpointError, ConfigError
from mlx_fastvlm.checkpoints.fastvlm import read_foreign
from mlx_fastvlm.checkpoints.image_fields import image_settings
from mlx_mobileclip.checkpoints.hub import Checkpoint
from mlx_mobileclip.json_fields import Fields
from mlx_mobileclip.preprocess.image import resize_crop, resize_pad, to_array

SIDE = 256
IDENTITY = {"image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0]}
CLIP_MEAN, CLIP_STD = [0.4814, 0.4578, 0.4082], [0.2686, 0.2613, 0.2758]
SHAPES = [(300, 200), (200, 301), (256, 256), (97, 500)]
FIELDS = {"model_type": "fast_vlm"}
PROCESSOR, PREPROCESSOR = "processor_config.json", "preprocessor_config.json"


@pytest.fixture(autouse=True, scope="module")
def importable_torchvision() -> None:
    """If torch is installed, transformers imports torchvision, which `oracle` prepares."""
    if find_spec("torch"):
        import oracle  # noqa: F401


def image_processor(kind: str, **changes: Any) -> Any:
    """transformers' image processor on Pillow."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    kinds = {"CLIPImageProcessor": CLIPImageProcessorPil}
    kinds["LlavaImageProcessor"] = LlavaImageProcessorPil
    square, shortest = {"height": SIDE, "width": SIDE}, {"shortest_edge": SIDE}
    return kinds[kind](**{"crop_size": square, "size": shortest, **IDENTITY, **changes})


def saved_fields(kind: str, directory: Path, **changes: Any) -> dict[str, Any]:
    """The fields that transformers writes for an image processor."""
    image_processor(kind, **changes).save_pretrained(directory)
    return dict(json.loads((directory / PREPROCESSOR).read_text()))


def put(directory: Path, name: str, values: dict[str, Any]) -> None:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(json.dumps(values))


def settings(directory: Path, **fields: Any) -> tuple[int, str]:
    directory.mkdir(exist_ok=True)
    return image_settings(Fields(FIELDS | fields, "config.json"), directory, stride=64)


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for w, h in SHAPES]


def assert_same_pixels(theirs: Any, found: tuple[int, str]) -> None:
    side, mode = found
    resize = resize_pad if mode == "pad" else resize_crop
    for picture in pictures():
        expected = theirs(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        assert np.array_equal(to_array(resize(picture, side)), expected), picture.size


# The forms that transformers has written.

NESTED = {"patch_size": 64, "num_additional_image_tokens": 0, "image_token": "<image>"}


@pytest.mark.parametrize("file", [PROCESSOR, PREPROCESSOR, "both"])
@pytest.mark.parametrize(
    ("kind", "changes", "mode"),
    [
        ("CLIPImageProcessor", {}, "crop"),
        ("CLIPImageProcessor", {"do_pad": True}, "crop"),  # always ignored by it
        ("LlavaImageProcessor", {}, "crop"),
        ("LlavaImageProcessor", {"do_pad": False}, "crop"),
        ("LlavaImageProcessor", {"do_pad": True}, "pad"),
        ("LlavaImageProcessor", {"do_pad": True, "do_normalize": False}, "pad"),
        ("LlavaImageProcessor", {"do_pad": True, "do_center_crop": False}, "pad"),
        ("LlavaImageProcessor", {"do_pad": True, "size": {"height": 256, "width": 256}}, "pad"),
        ("LlavaImageProcessor", {"size": 256, "crop_size": 256}, "crop"),
        ("LlavaImageProcessor", {"do_normalize": False, "image_mean": CLIP_MEAN}, "crop"),
    ],
)
def test_pixels_equal_transformers(
    kind: str, changes: dict[str, Any], mode: str, file: str, tmp_path: Path
) -> None:
    values = saved_fields(kind, tmp_path, **changes)
    (tmp_path / PREPROCESSOR).unlink()
    if file != PREPROCESSOR:
        put(tmp_path, PROCESSOR, NESTED | {"image_processor": values})
    if file != PROCESSOR:
        put(tmp_path, PREPROCESSOR, values)
    assert settings(tmp_path) == (SIDE, mode)
    assert_same_pixels(image_processor(kind, **changes), (SIDE, mode))


@pytest.mark.parametrize("suffix", ["", "Fast", "Pil"])
@pytest.mark.parametrize("kind", ["CLIPImageProcessor", "LlavaImageProcessor"])
def test_every_name_of_an_image_processor_is_known(kind: str, suffix: str, tmp_path: Path) -> None:
    values = saved_fields(kind, tmp_path) | {"image_processor_type": kind + suffix}
    put(tmp_path, PREPROCESSOR, values)
    assert settings(tmp_path) == (SIDE, "crop")


def test_fields_of_transformers_4_48(tmp_path: Path) -> None:
    """All fields of a CLIP image processor, as in the published FastVLM checkpoints."""
    old = {
        "crop_size": {"height": 1024, "width": 1024},
        "data_format": "channels_first",
        "default_to_square": False,
        "device": None,
        "disable_grouping": None,
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": None,
        "do_rescale": True,
        "do_resize": True,
        **IDENTITY,
        "image_processor_type": "CLIPImageProcessorFast",
        "input_data_format": None,
        "pad_size": None,
        "processor_class": "LlavaProcessor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "return_tensors": None,
        "size": {"shortest_edge": 1024},
    }
    put(tmp_path, PREPROCESSOR, old)
    put(tmp_path, PROCESSOR, NESTED | {"vision_feature_select_strategy": None})
    assert settings(tmp_path, image_seq_length=256) == (1024, "crop")
    feature_extractor = {"feature_extractor_type": "CLIPFeatureExtractor"}
    put(tmp_path, PREPROCESSOR, old | {"image_processor_type": None} | feature_extractor)
    assert settings(tmp_path) == (1024, "crop")


# Every field that transformers writes, changed one at a time.

CHANGES: dict[str, list[Any]] = {
    "crop_size": [None, 128, {"height": 256, "width": 128}, {"height": 320, "width": 320}],
    "do_center_crop": [False, None],
    "do_convert_rgb": [False, None],
    "do_normalize": [False, None],
    "do_pad": [True, None],
    "do_rescale": [False, None],
    "do_resize": [False, None, 1],
    "image_mean": [None, [], CLIP_MEAN, [0.0, 0.0, 0.1], 0.0, 0.5],
    "image_processor_type": ["LlavaImageProcessor", "CLIPImageProcessor", "ViTImageProcessor"],
    "image_std": [None, CLIP_STD, [1.0, 1.0, 0.5], 1.0, 0.5],
    "resample": [None, 0, 1, 2, 4, 5, 3.0],
    "rescale_factor": [None, 0.00392, 1 / 127.5, 1],
    "size": [
        None, 128, 256, {"shortest_edge": 288}, {"height": 256, "width": 256},
        {"height": 128, "width": 256}, {"shortest_edge": 256, "longest_edge": 300},
        {"shortest_edge": 256, "longest_edge": None},
    ],
    "pad_size": [{"height": 512, "width": 512}],
    "use_square_size": [True],
    "data_format": ["channels_last"],
    "default_to_square": [True],
}  # fmt: skip


@pytest.mark.parametrize("kind", ["CLIPImageProcessor", "LlavaImageProcessor"])
@pytest.mark.parametrize("base", [{}, {"do_pad": True}, {"do_normalize": False}], ids=str)
def test_every_field_acts_as_in_transformers_or_is_refused(
    kind: str, base: dict[str, Any], tmp_path: Path
) -> None:
    """The same pixels, or an error that names the field."""
    values = saved_fields(kind, tmp_path, **base)
    assert values.keys() <= CHANGES.keys()
    refused, followed = set(), set()
    for key, changes in CHANGES.items():
        for change in changes:
            changed = values | {key: change}
            put(tmp_path, PREPROCESSOR, changed)
            try:
                found = settings(tmp_path)
            except ConfigError as error:
                assert re.search(rf"\b{key}\b", str(error)) and "\n" not in str(error), change
                refused.add(key)
                continue
            name = changed.pop("image_processor_type")
            assert_same_pixels(image_processor(name, **changed), found)
            followed.add(key)
    assert {"size", "crop_size", "do_resize", "resample", "rescale_factor"} <= refused
    assert {"do_convert_rgb", "do_pad", "image_mean", "size"} <= followed


@pytest.mark.parametrize("key", ["crop_size", "image_mean", "image_std", "size"])
def test_missing_field_is_refused(key: str, tmp_path: Path) -> None:
    """transformers would use CLIP's default, 224 px, which no FastVLM reads."""
    values = saved_fields("LlavaImageProcessor", tmp_path)
    del values[key]
    put(tmp_path, PREPROCESSOR, values)
    with pytest.raises(ConfigError, match=f": {key}: is missing"):
        settings(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("patch_size", 16),
        ("num_additional_image_tokens", 1),
        ("vision_feature_select_strategy", "default"),
    ],
)
def test_unsupported_processor_fields_are_refused(key: str, value: Any, tmp_path: Path) -> None:
    nested = {"image_processor": saved_fields("LlavaImageProcessor", tmp_path)}
    put(tmp_path, PROCESSOR, NESTED | nested | {key: value})
    with pytest.raises(ConfigError, match=f"{PROCESSOR}: {key}: "):
        settings(tmp_path)


# Fields that several files state.


def test_files_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    values = saved_fields("LlavaImageProcessor", tmp_path)
    for change in ({"do_pad": True}, {"size": 512, "crop_size": 512}):
        put(tmp_path, PROCESSOR, NESTED | {"image_processor": values | change})
        with pytest.raises(ConfigError, match=r"contradict.*preprocessor_config\.json.*remove"):
            settings(tmp_path)


def test_image_seq_length_must_match_the_crop(tmp_path: Path) -> None:
    saved_fields("LlavaImageProcessor", tmp_path)
    assert settings(tmp_path, image_seq_length=16) == (SIDE, "crop")
    for length in (256, 576, 17):
        with pytest.raises(ConfigError, match=r"config\.json: image_seq_length: "):
            settings(tmp_path, image_seq_length=length)


def test_image_seq_length_without_an_image_processor(tmp_path: Path) -> None:
    """transformers cannot load such a checkpoint; images are padded as in Apple's code."""
    assert settings(tmp_path, image_seq_length=16) == (256, "pad")
    assert settings(tmp_path, image_seq_length=576) == (1536, "pad")
    assert settings(tmp_path) == (1024, "pad")
    for length in (17, 1, 0, "16", 10000):
        with pytest.raises(ConfigError, match="image_seq_length"):
            settings(tmp_path, image_seq_length=length)


@pytest.mark.parametrize("side", [224, 2048])
def test_unsupported_sizes_are_refused(side: int, tmp_path: Path) -> None:
    saved_fields("LlavaImageProcessor", tmp_path, size=side, crop_size=side)
    with pytest.raises(ConfigError, match=f": size: {side}"):
        settings(tmp_path)


def test_fields_of_apple_checkpoints() -> None:
    def found(**fields: Any) -> tuple[int, str]:
        return image_settings(
            Fields({"model_type": "llava_qwen2"} | fields, "c"), Path(), stride=64
        )

    tower = {"mm_vision_tower": "mobileclip_l_512"}
    assert found(**tower, image_aspect_ratio="pad") == (512, "pad")
    assert found(**tower, image_aspect_ratio="square") == found(**tower) == (512, "crop")
    assert found(**tower, mm_use_im_start_end=False) == (512, "crop")
    for key, value in (("image_aspect_ratio", "anyres"), ("mm_use_im_start_end", True)):
        with pytest.raises(ConfigError, match=f"c: {key}: "):
            found(**tower, **{key: value})


def test_load_reads_the_processor_files(tmp_path: Path) -> None:
    from mlx_fastvlm import load

    path = synthetic.write_layout(tmp_path, "fast_vlm")
    values = saved_fields("LlavaImageProcessor", path)
    (path / PREPROCESSOR).unlink()
    put(path, PROCESSOR, NESTED | {"image_processor": values | {"do_pad": True}})
    _, processor = load(path)
    assert (processor.image_size, processor.image_mode) == (SIDE, "pad")


# Every field of transformers' config.json, changed one at a time.

REFUSED: list[tuple[str, Any]] = [
    ("image_seq_length", 17), ("model_type", "llava"), ("multimodal_projector_bias", False),
    ("multimodal_projector_bias", None), ("projector_hidden_act", "relu"),
    ("projector_hidden_act", "gelu_new"), ("vision_feature_layer", -2),
    ("vision_feature_layer", [-1, -2]), ("vision_feature_select_strategy", "default"),
    ("text_config.hidden_act", "gelu"), ("text_config.hidden_size", 60),
    ("text_config.intermediate_size", 90), ("text_config.model_type", "qwen3"),
    ("text_config.layer_types", ["full_attention", "sliding_attention"]),
    ("text_config.layer_types", 5), ("text_config.head_dim", 32), ("text_config.head_dim", "16"),
    ("text_config.num_attention_heads", 2), ("text_config.num_hidden_layers", 3),
    ("text_config.num_key_value_heads", 3),
    ("text_config.rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6}),
    ("text_config.rope_parameters", {"partial_rotary_factor": 0.5, "rope_theta": 1e6}),
    ("text_config.rope_scaling", {"type": "linear", "factor": 2}),
    ("text_config.use_sliding_window", True), ("text_config.vocab_size", 385),
    ("vision_config.architecture", "vit_base"), ("vision_config.model_args.act_layer", "relu"),
    ("vision_config.model_args.layers", [1, 2, 1, 1, 1]),
    ("vision_config.model_args.embed_dims", [16, 32, 64, 128, 256]),
]  # fmt: skip
FOLLOWED: list[tuple[str, Any]] = [
    ("image_seq_length", 64),
    ("text_config.max_position_embeddings", 4096), ("text_config.rms_norm_eps", 1e-5),
    ("text_config.rope_parameters", {"rope_type": "default", "rope_theta": 1e4}),
]  # fmt: skip
WITHOUT_EFFECT: list[tuple[str, Any]] = [
    ("image_token_index", 7), ("transformers_version", "4.57"), ("text_config.use_cache", False),
    ("text_config.attention_dropout", 0.1), ("text_config.bos_token_id", 3),
    ("text_config.eos_token_id", 3), ("text_config.pad_token_id", 3), ("text_config.dtype", "x"),
    ("text_config.initializer_range", 1), ("text_config.max_window_layers", 1),
    ("text_config.sliding_window", 9), ("text_config.tie_word_embeddings", False),
    ("tie_word_embeddings", False), ("vision_config.do_pooling", False),  # either ties them
    ("vision_config.global_pool", "max"), ("vision_config.initializer_range", 1),
    ("vision_config.label_names", ["a"]), ("vision_config.num_classes", 3),
    ("vision_config.model_args.inference_mode", False), ("vision_config.model_type", "x"),
    ("vision_config.architecture", "fastvit_mci3.apple_mclip2_dfndr2b"),
    ("vision_config.hidden_size", 1),  # the tensors determine it
]  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the config.json that transformers writes."""
    from transformers import FastVlmConfig

    path = synthetic.write_layout(tmp_path_factory.mktemp("saved"), "fast_vlm")
    given = {k: v for k, v in synthetic.transformers_config().items() if k != "model_type"}
    FastVlmConfig(**given, image_seq_length=16).save_pretrained(path)
    return path


def changed_config(path: Path, name: str, value: Any) -> Any:
    values = json.loads((path / "config.json").read_text())
    *parents, key = name.split(".")
    section = values
    for parent in parents:
        section = section[parent]
    section[key] = value
    config, _ = read_foreign(Checkpoint(path, "saved"), values)
    return config


def test_every_config_field_is_listed(saved: Path) -> None:
    values = json.loads((saved / "config.json").read_text())
    names = {name for name, _ in (*REFUSED, *FOLLOWED, *WITHOUT_EFFECT)}
    for part in ("text_config", "vision_config"):
        listed = {name.split(".")[1] for name in names if name.startswith(f"{part}.")}
        assert values.pop(part).keys() <= listed
    assert values.keys() <= names


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_unsupported_fields_are_refused(saved: Path, name: str, value: Any) -> None:
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        changed_config(saved, name, value)
    assert "\n" not in str(caught.value)
    by_tensors = isinstance(caught.value, CheckpointError)  # whose shapes do not match
    assert by_tensors or name.rpartition(".")[2] in str(caught.value)


@pytest.mark.parametrize(("name", "value"), FOLLOWED)
def test_supported_fields_are_followed(saved: Path, name: str, value: Any) -> None:
    assert changed_config(saved, name, value) != changed_config(saved, "image_token_index", 1)


@pytest.mark.parametrize(("name", "value"), WITHOUT_EFFECT)
def test_fields_without_effect_are_ignored(saved: Path, name: str, value: Any) -> None:
    assert changed_config(saved, name, value) == changed_config(saved, "image_token_index", 1)
