"""Apply the JSON files of a source checkpoint, in open_clip's, Apple's or timm's format.

Every field is applied, known to have no effect, or refused by name: ignoring one silently could
give plausible but wrong results.

Source of the fields and their defaults: open_clip 3.3.0 `model.py`, `transform.py`,
`timm_model.py`; apple/ml-mobileclip 4144bb1 `mobileclip/text_encoder.py`; timm 1.0.31
`models/_hub.py`, `models/_pretrained.py`. Published files: those of Hugging Face's apple and timm.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from typing import Any

from ..errors import ConfigError
from ..json_fields import Fields
from ..models.clip import MobileCLIPConfig, PreprocessConfig
from ..models.text import TextConfig
from ..models.variants import OPENAI, TOWERS
from ..models.vit import ViTConfig

MODEL_SECTIONS = ("embed_dim", "vision_cfg", "image_cfg", "text_cfg")
OPEN_CLIP_SECTIONS = ("embed_dim", "vision_cfg", "text_cfg")  # a complete open_clip config
TIMM_SECTIONS = ("architecture", "pretrained_cfg")

# Fields without effect on results: about training, files, and parts that are not built.
METADATA = {
    *("_name_or_path", "architectures", "library_name", "license", "model_type", "name", "tags"),
    *("torch_dtype", "transformers_version"),
}
MODEL_IGNORED = {
    *("custom_text", "init_logit_scale", "nonscalar_logit_scale", "output_dict", "preprocess_cfg"),
    *MODEL_SECTIONS,
}
VISION_IGNORED = {
    *("timm_model_pretrained", "timm_drop", "timm_drop_path", "timm_proj_bias", "patch_dropout"),
    # Fields of open_clip's own towers, which it ignores if a timm tower is named.
    *("layers", "width", "head_width", "mlp_ratio", "patch_size", "ls_init_value", "pool_type"),
    *("attentional_pool", "attn_pooler_queries", "attn_pooler_heads", "no_ln_pre", "block_type"),
    *("pos_embed_type", "final_ln_after_pool", "output_tokens", "act_kwargs", "norm_kwargs"),
    *("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"),
}
TEXT_IGNORED = {
    *("pad_id", "eos_id", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type"),
    *("embed_dropout", "no_scale_embedding"),  # Apple's code never applies the scale
}
TIMM_IGNORED = {
    *("num_classes", "num_features", "label_names", "label_descriptions", *TIMM_SECTIONS),
}
TIMM_ARGS_IGNORED = {
    *("num_classes", "inference_mode", "drop_rate", "drop_path_rate", "proj_drop_rate"),
    *("pos_drop_rate", "patch_drop_rate", "attn_drop_rate"),
}
PRETRAINED_IGNORED = {
    *("url", "file", "hf_hub_id", "hf_hub_filename", "source", "tag", "custom_load"),
    *("test_input_size", "min_input_size", "fixed_input_size", "test_crop_pct", "num_classes"),
    *("label_offset", "label_names", "label_descriptions", "pool_size", "test_pool_size"),
    *("first_conv", "classifier", "license", "description", "origin_url", "paper_name"),
    *("paper_ids", "notes"),
}
# Supported values of fields that cannot be changed.
OFF = (False, None)
MODEL_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "quick_gelu": OFF,
    "init_logit_bias": (None,),
    "multimodal_cfg": (None,),
}
TEXT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "mlp_ratio": (4,),
    "pool_type": ("argmax",),
    "proj_type": ("linear",),
    "act_kwargs": (None, {}),
    "norm_kwargs": (None, {}, {"eps": 1e-5}),
    "block_type": (None, "default"),
    "tokenizer_kwargs": (None, {}, {"clean": "lower"}),
    "norm_layer": ("layer_norm_fp32", "layer_norm"),
    **dict.fromkeys(("hf_model_name", "hf_tokenizer_name"), (None, "")),
    **dict.fromkeys(("ls_init_value", "tokenizer_mode"), (None,)),
    **dict.fromkeys(("embed_cls", "final_ln_after_pool", "proj_bias", "output_tokens"), OFF),
    **dict.fromkeys(("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner"), OFF),
    **dict.fromkeys(("scale_attn", "scale_fc", "no_pos_embedding"), OFF),
}
# Fields that are applied: canonical name, name in Apple's files, default of open_clip.
TEXT_SIZES = (
    ("width", "dim", 512),
    ("layers", "n_transformer_layers", 12),
    ("heads", "n_heads_per_layer", 8),
    ("vocab_size", None, 49408),
    ("context_length", None, 77),
)
TEXT_KNOWN = {
    *("causal_masking", "no_causal_mask", "model_name", "ffn_multiplier_per_layer"),
    *(name for sizes in TEXT_SIZES for name in sizes[:2] if name),
}
PREPROCESS_KNOWN = {"mean", "std", "interpolation", "size", "fill_color"}  # the last has no effect
PREPROCESS_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "resize_mode": ("shortest", None),
    "mode": ("RGB", None),
}
# timm's published files state its default preprocessing for classifiers: bicubic, with these values
# of crop_pct. The towers were trained with CLIP's preprocessing, which is used instead.
TIMM_CROPS = {
    "fastvit_mci0": (0.95, 1.0),
    "vit_base_mci_224": (0.9,),
    "vit_large_patch14_clip_224": (1.0,),
}
DEFAULT_TIMM_CROP = (0.95,)  # other towers
OPEN_CLIP_PREPROCESS = {"mean": OPENAI[0], "std": OPENAI[1], "interpolation": "bicubic"}


def describes_a_model(fields: Fields) -> bool:
    """Whether a JSON file has a section that this module reads."""
    sections = ("model_cfg", "preprocess_cfg", *MODEL_SECTIONS, *TIMM_SECTIONS)
    return any(fields.has(key) for key in sections)


def described_variant(fields: Fields) -> str | None:
    """The published model with the image tower that a file names; None if it names none.

    Raises:
        ConfigError: no published model has this tower.
    """
    tower = _tower(fields)
    if tower is None:
        return None
    section, key, name = tower
    variant = TOWERS.get(name)
    if variant is None:
        raise section.error(key, f"{name[:40]!r} is not one of {', '.join(TOWERS)}")
    model = _model(fields)
    plain_text = model.has("text_cfg") and model.object("text_cfg").get("model_name", "") == "base"
    return "MobileCLIP2-S0" if variant == "MobileCLIP-S0" and plain_text else variant


def apply_config_file(
    fields: Fields,
    config: MobileCLIPConfig,
    registry: Mapping[str, MobileCLIPConfig],
    *,
    port: bool = False,
    with_preprocess: bool = True,
) -> MobileCLIPConfig:
    """Update the config of a variant from a JSON file.

    Args:
        fields: The whole file.
        config: Config of the variant, possibly updated from another file.
        registry: Configs of all variants.
        port: Whether this is Apple's model as published for open_clip or timm. The file of B then
            names timm's tower, but the weights were trained with Apple's.
        with_preprocess: Whether to apply the preprocessing of the file.

    Raises:
        ConfigError: a field is not known, or requires what is not supported.
    """
    described = described_variant(fields)
    if described is not None and registry[described].image != config.image and not port:
        section, key, name = _tower(fields) or (fields, "architecture", "")
        others = [v for v in registry if registry[v].image == registry[described].image]
        raise section.error(
            key,
            f"{name!r} is not the image tower of {config.variant}, but of {', '.join(others)}",
        )
    if any(fields.has(key) for key in TIMM_SECTIONS):
        return _timm(fields, config, with_preprocess)
    model = _model(fields)
    complete = all(model.has(key) for key in OPEN_CLIP_SECTIONS)
    if describes_a_model(model):
        _check(
            model,
            MODEL_IGNORED if model is not fields else MODEL_IGNORED | METADATA,
            MODEL_SUPPORTED,
        )
    if model.has("embed_dim"):
        config = replace(config, embed_dim=model.integer("embed_dim", 1, 65536))
    if model.has("text_cfg") and config.text is not None:
        text = _text_config(model.object("text_cfg"), config.text, config.variant, complete)
        config = replace(config, text=text)
    stated = _vision(model, config, complete)
    where = fields.where
    if fields.has("preprocess_cfg"):
        section = fields.object("preprocess_cfg")
        if with_preprocess:
            where = section.where
            stated |= _preprocess(section, stated, complete)
    elif complete and model is not fields:  # open_clip loads such a file with its own defaults
        stated |= OPEN_CLIP_PREPROCESS
    return with_preprocessing(config, stated, where) if with_preprocess else config


def with_preprocessing(
    config: MobileCLIPConfig, stated: Mapping[str, Any], where: str
) -> MobileCLIPConfig:
    """Change the preprocessing of a config; checks it, also against the image tower."""
    fields = Fields({**asdict(config.preprocess), **stated}, where)
    preprocess = PreprocessConfig.from_json(fields)
    size = preprocess.image_size
    if isinstance(config.image, ViTConfig) and size != config.image.image_size:
        raise fields.error("image_size", f"{size} is not the tower's {config.image.image_size}")
    return replace(config, preprocess=preprocess)


def _model(fields: Fields) -> Fields:
    return fields.object("model_cfg") if fields.has("model_cfg") else fields


def _tower(fields: Fields) -> tuple[Fields, str, str] | None:
    """The section and field that name the image tower, and the name without timm's tag."""
    model = _model(fields)
    for section, key in (("vision_cfg", "timm_model_name"), ("image_cfg", "model_name")):
        if model.has(section) and model.object(section).has(key):
            part = model.object(section)
            return part, key, part.string(key).partition(".")[0]
    if fields.has("architecture"):
        return fields, "architecture", fields.string("architecture").partition(".")[0]
    return None


def _check(
    fields: Fields, known: Collection[str], supported: Mapping[str, tuple[Any, ...]] | None = None
) -> None:
    """Refuse unknown fields and unsupported values."""
    for key, value in fields.values.items():
        if supported and key in supported:
            allowed = supported[key]
            if not any(value == each and type(value) is type(each) for each in allowed) and not (
                type(value) in (int, float) and value in allowed
            ):
                raise _unsupported(fields, key, value, allowed[0])
        elif key not in known:
            shown = key[:40] if key.isprintable() else ascii(key[:40])
            raise ConfigError(
                f"{fields.where}: {shown}: is not a known field, and may change the results; "
                "remove it if it does not"
            )


def _unsupported(fields: Fields, key: str, value: Any, expected: Any) -> ConfigError:
    """The error for a value that is not supported."""
    actual, supported = ("null" if v is None else repr(v)[:60] for v in (value, expected))
    return ConfigError(
        f"{fields.where}: {key}: {actual} is not supported, only {supported}; run this "
        "checkpoint in the program it was made with"
    )


def _text_config(fields: Fields, text: TextConfig, variant: str, complete: bool) -> TextConfig:
    """Update the text tower; in a complete config, missing fields have open_clip's defaults."""
    _check(fields, TEXT_KNOWN | TEXT_IGNORED, TEXT_SUPPORTED)
    causal = text.causal
    if fields.has("causal_masking"):
        causal = fields.boolean("causal_masking")
    elif fields.has("no_causal_mask") or complete:
        causal = not fields.boolean("no_causal_mask", False)
    if causal != text.causal:
        raise fields.error(
            "causal_masking" if fields.has("causal_masking") else "no_causal_mask",
            f"the causal mask is {'on' if causal else 'off'}, unlike that of {variant}; "
            "choose the --variant that it was trained as",
        )
    kind = "mct" if text.rep_mixers else "base"
    if complete and text.rep_mixers:
        raise fields.error("model_name", f"is missing, but {variant} has Apple's text tower")
    if fields.get("model_name", kind) != kind:
        raise fields.error(
            "model_name", f"is not the {kind!r} of {variant}; choose another --variant"
        )
    values: dict[str, Any] = asdict(text)
    for canonical, apple, default in TEXT_SIZES:
        key = canonical if apple is None or fields.has(canonical) else apple
        if fields.has(key):
            values[canonical] = _per_layer_value(fields, key)
        elif complete:
            values[canonical] = default
    ratio = "ffn_multiplier_per_layer"
    if fields.has(ratio) and _per_layer_value(fields, ratio) != 4:
        raise _unsupported(fields, ratio, fields.get(ratio), 4)
    return TextConfig.from_json(Fields(values, fields.where))


def _per_layer_value(fields: Fields, key: str) -> Any:
    """A field of Apple's: one value, or a list of equal values, one per layer."""
    value = fields.get(key)
    if not isinstance(value, list):
        return value
    if not value or any(each != value[0] for each in value):
        raise fields.error(key, "differs between layers, which is not supported")
    return value[0]


def _vision(model: Fields, config: MobileCLIPConfig, complete: bool) -> dict[str, Any]:
    """Check the image tower in a file; returns its image size if it has one."""
    stated: dict[str, Any] = {}
    if model.has("vision_cfg"):
        fields = model.object("vision_cfg")
        pool = "token" if isinstance(config.image, ViTConfig) else "avg"
        supported = {"timm_pool": (pool,), "timm_proj": (None, "")}
        if complete:
            if not fields.has("timm_model_name"):
                raise fields.error("timm_model_name", "is missing; only timm towers are supported")
            defaults = {"timm_pool": "avg", "timm_proj": "linear", "image_size": 224}
            fields = Fields({**defaults, **fields.values}, fields.where)
        _check(fields, VISION_IGNORED | {"timm_model_name", "image_size"}, supported)
        stated |= _image_size(fields, "image_size")
    if model.has("image_cfg"):
        fields = model.object("image_cfg")
        _check(fields, {"model_name", "image_size"})
        stated |= _image_size(fields, "image_size")
    return stated


def _image_size(fields: Fields, key: str) -> dict[str, int]:
    """The side of the square image, as a number or a list of one or two; empty if absent."""
    if not fields.has(key):
        return {}
    value = fields.get(key)
    if isinstance(value, list):
        sides = fields.integers(key, 1, 1 << 20, length=len(value) if len(value) == 1 else 2)
        if len(set(sides)) > 1:
            raise fields.error(key, f"{list(sides)} is not square; only squares are supported")
        return {"image_size": sides[0]}
    return {"image_size": fields.integer(key, 1, 1 << 20)}


def _preprocess(fields: Fields, stated: Mapping[str, Any], complete: bool) -> dict[str, Any]:
    """Read open_clip's `preprocess_cfg`, with its defaults if the file is complete."""
    _check(fields, PREPROCESS_KNOWN, PREPROCESS_SUPPORTED)
    result = dict(OPEN_CLIP_PREPROCESS) if complete else {}
    result |= {key: fields.values[key] for key in OPEN_CLIP_PREPROCESS if fields.has(key)}
    size = _image_size(fields, "size")
    if size and stated.get("image_size", size["image_size"]) != size["image_size"]:
        raise fields.error("size", f"is not the image_size of the model, {stated['image_size']}")
    return result | size


def _timm(fields: Fields, config: MobileCLIPConfig, with_preprocess: bool) -> MobileCLIPConfig:
    """Update the config from a timm file."""
    pool: dict[str, tuple[Any, ...]] = {
        "global_pool": ("token" if isinstance(config.image, ViTConfig) else "avg", None)
    }
    _check(fields, TIMM_IGNORED | METADATA | {"model_args"}, pool)
    model_size: dict[str, int] = {}
    if fields.has("model_args"):
        arguments = fields.object("model_args")
        _check(arguments, TIMM_ARGS_IGNORED | {"img_size"}, pool | {"in_chans": (3, None)})
        model_size = _image_size(arguments, "img_size")
    if not fields.has("pretrained_cfg"):
        return with_preprocessing(config, model_size, fields.where) if with_preprocess else config
    part = fields.object("pretrained_cfg")
    known = {"architecture", "input_size", "mean", "std", "crop_pct", "interpolation"}
    _check(part, PRETRAINED_IGNORED | known, {"crop_mode": ("center", None), "state_dict": (None,)})
    if not with_preprocess:
        return config
    name = fields.string("architecture", "").partition(".")[0]
    if part.has("architecture") and part.string("architecture").partition(".")[0] != name:
        raise part.error("architecture", f"is not the {name[:40]!r} of the file")
    crop, how = part.get("crop_pct", None), part.get("interpolation", None)
    crops = TIMM_CROPS.get(name, DEFAULT_TIMM_CROP)
    published = crop in (None, *crops) and how in (None, "bicubic")
    if not published and (crop, how) != (1.0, config.preprocess.interpolation):
        key = "crop_pct" if how in (None, "bicubic") else "interpolation"
        raise ConfigError(
            f"{part.where}: {key}: {part.get(key)!r:.60} is neither that of the published "
            "models nor CLIP's preprocessing; give it with --preprocess (preprocess= in Python)"
        )
    stated = {key: part.values[key] for key in ("mean", "std") if part.has(key)}
    if part.has("input_size"):
        channels, *sides = part.integers("input_size", 1, 1 << 20, length=3)
        if channels != 3:
            raise part.error("input_size", f"has {channels} channels instead of 3")
        stated |= _image_size(Fields({"input_size": list(sides)}, part.where), "input_size")
        if model_size and model_size["image_size"] != stated["image_size"]:
            size = model_size["image_size"]
            raise part.error("input_size", f"is not the img_size of model_args, {size}")
    return with_preprocessing(config, stated | model_size, part.where)
