"""The image size and mode that a source checkpoint was trained with.

Apple's layout has them in config.json. transformers' has them in the image processor's file:
processor_config.json since transformers 5, preprocessor_config.json before. A field missing there
has the default of its class. Values that a canonical config cannot express are refused.

Pixels are bit-identical to those of transformers' Pillow processors. Its tensor processors round
resized values differently: on noise, under 1% of values differ, by 2 of 255 levels at most.

Source: transformers 5.23 `models/llava/processing_llava.py`, `models/{llava,clip}/
image_processing_*.py`; apple/ml-fastvlm 592b4ad `llava/mm_utils.py` process_images.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_mobileclip.errors import ConfigError
from mlx_mobileclip.json_fields import Fields, read_json

from ..models.config import RESOLUTIONS

IMAGE_SIZE = 1024  # of every published FastVLM
CLIP, LLAVA = "CLIPImageProcessor", "LlavaImageProcessor"
# Supported values of each field; the first one is the default.
PROJECTOR_FIELDS: Mapping[str, tuple[Any, ...]] = {
    "projector_hidden_act": ("gelu",),
    "multimodal_projector_bias": (True,),
    "vision_feature_layer": (-1,),
    "vision_feature_select_strategy": ("full",),
}
PIXEL_FIELDS: Mapping[str, tuple[Any, ...]] = {
    "do_resize": (True,),
    "do_rescale": (True,),
    "resample": (3,),  # bicubic
    "rescale_factor": (1 / 255,),
    "use_square_size": (False, None),
    "data_format": ("channels_first", None),
}

ImageSettings = tuple[int, str]


def check_supported(fields: Fields, supported: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise ConfigError for unsupported values; null is not a missing field, as in transformers."""
    for key, allowed in supported.items():
        value = fields.values.get(key, allowed[0])
        if not any(value == each and type(value) is type(each) for each in allowed):
            raise fields.error(key, f"{_excerpt(value)}, only {_excerpt(allowed[0])} is supported")


def image_settings(fields: Fields, directory: Path, stride: int) -> ImageSettings:
    """Return the side of images in pixels, and "pad" or "crop".

    Args:
        fields: The checkpoint's config.json.
        directory: The checkpoint.
        stride: Side in pixels of the square that each embedding covers.

    Raises:
        ConfigError: a field has a value that is not supported, or two fields contradict.
    """
    if fields.get("model_type") == "fast_vlm":
        return _transformers_settings(fields, directory, stride)
    check_supported(fields, {"mm_use_im_start_end": (False, None)})
    # Without the field, Apple's code does not pad, and mlx-vlm's does.
    default = "square" if fields.get("model_type") == "llava_qwen2" else "pad"
    aspect = fields.choice("image_aspect_ratio", ("pad", "square"), default)
    suffix = fields.string("mm_vision_tower", "").rpartition("_")[2]
    side = int(suffix) if re.fullmatch(r"[0-9]{1,5}", suffix) else IMAGE_SIZE
    return side, "pad" if aspect == "pad" else "crop"


def _transformers_settings(fields: Fields, directory: Path, stride: int) -> ImageSettings:
    check_supported(fields, PROJECTOR_FIELDS)
    settings: list[ImageSettings] = []
    path = directory / "processor_config.json"
    if path.exists():
        processor = Fields(read_json(path), str(path))
        check_supported(
            processor,
            {
                "patch_size": (stride, None),
                "num_additional_image_tokens": (0, None),
                "vision_feature_select_strategy": ("full", None),
            },
        )
        if processor.has("image_processor"):
            settings.append(_processor_settings(processor.object("image_processor")))
    path = directory / "preprocessor_config.json"
    if path.exists():
        settings.append(_processor_settings(Fields(read_json(path), str(path))))
    if len(set(settings)) > 1:
        (side, mode), (old_side, old_mode) = settings
        raise ConfigError(
            f"{directory}: processor_config.json ({side} px, {mode}) contradicts "
            f"preprocessor_config.json ({old_side} px, {old_mode}); remove the wrong one"
        )
    implied = _side_from_length(fields, stride) if fields.has("image_seq_length") else None
    if not settings:
        return implied or IMAGE_SIZE, "pad"  # as in Apple's training
    if implied not in (None, settings[0][0]):
        count = (settings[0][0] // stride) ** 2
        raise ConfigError(
            f"{fields.where}: image_seq_length: implies {implied} px, but the image processor's "
            f"file says {settings[0][0]} px; if the file is right, set image_seq_length to {count}"
        )
    return settings[0]


def _side_from_length(fields: Fields, stride: int) -> int:
    count = fields.integer("image_seq_length", 1, (RESOLUTIONS[-1] // stride) ** 2)
    side = math.isqrt(count) * stride
    if math.isqrt(count) ** 2 != count or side not in RESOLUTIONS:
        raise fields.error("image_seq_length", f"{count} embeddings do not form a supported square")
    return side


def _processor_settings(fields: Fields) -> ImageSettings:
    """Read the file of a CLIPImageProcessor or LlavaImageProcessor."""
    kind = fields.string("image_processor_type", fields.get("feature_extractor_type", LLAVA))
    kind = kind.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast")
    if kind.removesuffix("Pil") not in (CLIP, LLAVA):
        only = f"only {CLIP} and {LLAVA} are supported"
        raise fields.error("image_processor_type", f"{kind[:40]!r}, {only}")
    check_supported(fields, PIXEL_FIELDS)
    do_pad, is_llava = _flag(fields, "do_pad", False), kind.startswith(LLAVA)
    if do_pad and not is_llava and fields.has("pad_size"):
        raise fields.error("pad_size", "is not supported")
    pads = do_pad and is_llava  # CLIP's pads only to make a batch of one size
    normalizes = _flag(fields, "do_normalize", True)
    if pads or normalizes:  # the mean is also the colour of padding
        _check_channels(fields, "image_mean", 0)
    if normalizes:
        _check_channels(fields, "image_std", 1)
    side = _resized_side(fields, pads)
    if not _flag(fields, "do_center_crop", True):
        if not pads:
            raise fields.error("do_center_crop", "must be true unless do_pad is")
    elif _cropped_sides(fields) != (side, side):
        raise fields.error("crop_size", f"only {side} px, as in size, is supported")
    return side, "pad" if pads else "crop"


def _flag(fields: Fields, key: str, default: bool) -> bool:
    """A field that is true or false; null is false, as in transformers."""
    given = key in fields.values
    return fields.has(key) and fields.boolean(key) if given else default


def _check_channels(fields: Fields, key: str, expected: int) -> None:
    value = fields.get(key)
    colours = value if isinstance(value, list) else [value] * 3
    if colours != [expected] * 3:
        raise fields.error(key, f"{_excerpt(value)}, only {expected} for each colour is supported")


def _resized_side(fields: Fields, pads: bool) -> int:
    value = fields.get("size")
    if isinstance(value, dict):
        value = {key: side for key, side in value.items() if side is not None}
    elif _flag(fields, "default_to_square", False):
        value = {"height": value, "width": value}
    else:
        value = {"shortest_edge": value}
    sides = list(value.values())
    square = pads and value.keys() == {"height", "width"} and sides[0] == sides[1]
    if value.keys() != {"shortest_edge"} and not square:
        raise fields.error("size", f"{_excerpt(value)}, only shortest_edge is supported")
    if isinstance(sides[0], bool) or sides[0] not in RESOLUTIONS:
        first, last = RESOLUTIONS[0], RESOLUTIONS[-1]
        limits = f"{first} to {last} in steps of {RESOLUTIONS.step}"
        raise fields.error("size", f"{_excerpt(sides[0])} is not one of {limits}")
    return int(sides[0])


def _cropped_sides(fields: Fields) -> tuple[Any, Any]:
    value = fields.get("crop_size")
    return (value.get("height"), value.get("width")) if isinstance(value, dict) else (value, value)


def _excerpt(value: Any) -> str:
    return json.dumps(value)[:60]
