"""FastVLM checkpoints of every known layout, read as canonical config and tensors.

The source's config.json is first converted to canonical form and checked. Then the tensors are read
by the names and shapes that it implies.
"""

from dataclasses import replace
from typing import Any

import mlx.core as mx

from mlx_mobileclip.checkpoints.core_ml.towers import read_image_tower
from mlx_mobileclip.checkpoints.hub import Checkpoint, fetch_package
from mlx_mobileclip.checkpoints.reparameterize import fold_fastvit
from mlx_mobileclip.checkpoints.safetensors import read_tensors
from mlx_mobileclip.checkpoints.source import Source, without_prefixes
from mlx_mobileclip.errors import CheckpointError, ConfigError
from mlx_mobileclip.json_fields import Fields, read_json
from mlx_mobileclip.models.fastvit import PRESETS, FastViTConfig

from ..models.config import FORMAT_VERSION, MODEL_TYPE, FastVLMConfig, Qwen2Config
from .decoder import DecoderReader, SourceQuantization
from .image_fields import ImageSettings, check_supported, image_settings
from .layouts import detect, fastvlm_source, tower_keys

ROPE_THETA = 1e6  # in every FastVLM; transformers' default is 10000
MAX_POSITIONS = 32768
MAX_LENGTH = 8192
VISION_PACKAGE = "fastvithd.mlpackage"  # the image tower of Apple's app exports
# transformers' converter appends one block of 64 random rows to Qwen2's vocabularies.
PADDED_VOCABULARIES = {152000: 151936, 152128: 152064}
TEXT_FIELDS = {"use_sliding_window": (False, None), "hidden_act": ("silu", None)}
TIMM_ARGUMENTS = (  # without effect on a trained model
    "inference_mode", "num_classes", "global_pool", "drop_rate", "drop_path_rate",
    "proj_drop_rate", "layer_scale_init_value",
)  # fmt: skip
WRAPPERS = ("base_model.model.", "module.", "_orig_mod.")  # of PEFT, DDP and torch.compile
NEVER_USED = r"\.num_batches_tracked$|\.rotary_emb\.inv_freq$|\.head\.(proj|fc\.weight|fc\.bias)$"


def read_foreign(
    checkpoint: Checkpoint, values: dict[str, Any], vision_from: Checkpoint | None = None
) -> tuple[FastVLMConfig, dict[str, mx.array]]:
    """Read a source checkpoint as canonical config and lazy canonical tensors.

    Args:
        checkpoint: The source.
        values: Contents of its config.json.
        vision_from: Checkpoint with the image tower, if the source has none; by default the
            source's Core ML package.

    Raises:
        CheckpointError: tensors are missing, unexpected, of the wrong shape, or not quantised
            as the config says.
        ConfigError: the config does not describe a FastVLM.
    """
    fields = Fields(values, str(checkpoint.path / "config.json"))
    _check_model_type(fields)
    tensors = without_prefixes(read_tensors(checkpoint.path), WRAPPERS)
    layout = detect(tensors, checkpoint.name)
    has_tower = bool(tower_keys(tensors, layout))
    if has_tower and vision_from is not None:
        raise CheckpointError(
            f"{checkpoint.name}: already has an image tower; leave out --vision-from"
        )
    if has_tower:
        vision, tower, tower_origin = _vision_config(fields), None, None
    else:
        vision, tower, tower_origin = _separate_tower(checkpoint, fields, vision_from)
    images = image_settings(fields, checkpoint.path, vision.stride)
    config = _convert_config(fields, vision, images)
    source = fastvlm_source(tensors, layout, vision, config.projector_type, checkpoint.name)
    if tower is None:
        tower = fold_fastvit(source, vision, "vision.")
    decoder = DecoderReader(source, config, SourceQuantization(fields))
    canonical = {f"vision_tower.{name}": tensor for name, tensor in tower.items()}
    canonical |= decoder.projector() | decoder.layers() | decoder.vocabulary(_stored_rows(fields))
    source.drop(NEVER_USED)
    source.finish()
    decoder.warn_if_untied()
    provenance: dict[str, str | None] = {
        "model": checkpoint.name,
        "revision": checkpoint.revision,
        "layout": layout.name,
    }
    if tower_origin is not None:
        provenance["vision_from"] = tower_origin
    return replace(config, quantization=decoder.quantized, source=provenance), canonical


def _check_model_type(fields: Fields) -> None:
    if fields.has("model_file"):
        raise ConfigError(
            f"{fields.where}: model_file: names code to run; code of a checkpoint is never run"
        )
    kind = fields.string("model_type", "")
    if kind not in ("llava_qwen2", "fast_vlm", "fastvlm"):
        raise ConfigError(
            f"{fields.where}: model_type {kind[:40]!r} is not a FastVLM; "
            "expected llava_qwen2 or fast_vlm, such as apple/FastVLM-0.5B"
        )


def _separate_tower(
    checkpoint: Checkpoint, fields: Fields, vision_from: Checkpoint | None
) -> tuple[FastViTConfig, dict[str, mx.array], str]:
    """Config, tensors and origin of an image tower that is stored separately."""
    if vision_from is not None:
        commit = f", commit {vision_from.revision}" if vision_from.revision else ""
        return *_read_tower(vision_from), vision_from.name + commit
    vision = _vision_config(fields)
    tower = _packaged_tower(checkpoint, vision)
    if tower is None:
        raise CheckpointError(
            f"{checkpoint.name}: has no image tower and no {VISION_PACKAGE}; add "
            "--vision-from with the original checkpoint of the same size and stage, such as "
            "apple/FastVLM-0.5B"
        )
    return vision, tower, VISION_PACKAGE


def _packaged_tower(checkpoint: Checkpoint, vision: FastViTConfig) -> dict[str, mx.array] | None:
    """The tower in the checkpoint's Core ML package, or None; Apple's app exports have one."""
    path = fetch_package(checkpoint, VISION_PACKAGE)
    if path is None:
        return None
    where = f"{checkpoint.name}: {VISION_PACKAGE}"
    source = Source(read_image_tower(path, where, vision), lambda name: name, where)
    tower = fold_fastvit(source, vision)
    source.finish()
    return tower


def _convert_config(fields: Fields, vision: FastViTConfig, images: ImageSettings) -> FastVLMConfig:
    """Convert a source's config.json to the canonical config."""
    values = {
        "format_version": FORMAT_VERSION,
        "text_config": _text_config(fields),
        "vision_config": vision.to_json(),
        "projector_type": fields.string("mm_projector_type", "mlp2x_gelu"),
        "image_size": images[0],
        "image_mode": images[1],
        "max_length": fields.integer("tokenizer_model_max_length", 1, 1 << 20, MAX_LENGTH),
    }
    config, text = FastVLMConfig.from_json(values, fields.where), _text_fields(fields)
    head_dim = config.text.head_dim
    if text.get("head_dim", head_dim) != head_dim:
        raise text.error("head_dim", f"only {head_dim} (hidden_size / heads) is supported")
    return config


def _read_tower(checkpoint: Checkpoint) -> tuple[FastViTConfig, dict[str, mx.array]]:
    """Config and tensors of another checkpoint's tower, in any layout."""
    path = checkpoint.path / "config.json"
    values = read_json(path)
    tensors = read_tensors(checkpoint.path)
    if values.get("model_type") == MODEL_TYPE:
        config = FastVLMConfig.from_json(values, str(path))
        prefix = "vision_tower."
        return config.vision, {
            k[len(prefix) :]: t for k, t in tensors.items() if k.startswith(prefix)
        }
    fields = Fields(values, str(path))
    _check_model_type(fields)
    tensors = without_prefixes(tensors, WRAPPERS)
    layout = detect(tensors, checkpoint.name)
    vision = _vision_config(fields)
    towers = {key: tensors[key] for key in tower_keys(tensors, layout)}
    if not towers:
        packaged = _packaged_tower(checkpoint, vision)
        if packaged is None:
            raise CheckpointError(
                f"{checkpoint.name}: given as --vision-from, but has no image tower"
            )
        return vision, packaged
    source = fastvlm_source(towers, layout, vision, "identity", checkpoint.name)
    tower = fold_fastvit(source, vision, "vision.")
    source.drop(NEVER_USED)
    source.finish()
    return vision, tower


def _text_fields(fields: Fields) -> Fields:
    """The decoder's fields: at the top in LLaVA's form, under text_config in transformers'."""
    if fields.has("text_config") and fields.object("text_config").has("hidden_size"):
        return fields.object("text_config")
    return fields


def _stored_rows(fields: Fields) -> int:
    """Number of rows of the stored vocabulary, padding included."""
    return _text_fields(fields).integer("vocab_size", 1, 1_000_000)


def _text_config(fields: Fields) -> dict[str, Any]:
    text = _text_fields(fields)
    check_supported(text, TEXT_FIELDS)
    if fields.get("model_type") == "fast_vlm":
        check_supported(text, {"model_type": ("qwen2",)})
    layers = text.get("layer_types", [])
    if not isinstance(layers, list) or any(kind != "full_attention" for kind in layers):
        raise text.error("layer_types", "only full_attention is supported")
    rope = text.object("rope_parameters") if text.has("rope_parameters") else text
    for key in ("rope_parameters", "rope_scaling"):
        scaling = text.object(key) if text.has(key) else Fields({}, "")
        if scaling.get("rope_type", scaling.get("type", "default")) != "default":
            raise text.error(key, "only the default rotary embedding is supported")
        if scaling.get("partial_rotary_factor", 1) != 1:
            raise text.error(key, "partial_rotary_factor: only 1 is supported")
    vocab_size = _stored_rows(fields)
    if fields.get("model_type") == "fast_vlm":
        vocab_size = PADDED_VOCABULARIES.get(vocab_size, vocab_size)
    defaults = {"rms_norm_eps": 1e-6, "max_position_embeddings": MAX_POSITIONS}
    names = Qwen2Config.__dataclass_fields__
    values = defaults | {k: v for k, v in text.values.items() if k in names and v is not None}
    values["rope_theta"] = rope.get("rope_theta", text.get("rope_theta", ROPE_THETA))
    tied = (config.boolean("tie_word_embeddings", False) for config in (fields, text))
    values["tie_word_embeddings"] = any(tied)  # as in transformers, either one ties them
    return {**values, "vocab_size": vocab_size}


def _vision_config(fields: Fields) -> FastViTConfig:
    """The tower's config: FastViTHD's, with the values that vision_config overrides."""
    given = fields.object("vision_config") if fields.has("vision_config") else Fields({}, "")
    tower = fields.string("mm_vision_tower", "mobileclip_l")
    name = given.string("architecture", "fastvit_mci3").removeprefix("fastvit_")
    name = name.partition(".")[0]  # timm's tag of pretrained weights
    if name not in PRESETS:
        raise given.error("architecture", f"{name[:40]!r} is not FastViTHD")
    if not tower.startswith("mobileclip_l"):
        raise fields.error("mm_vision_tower", f"{tower[:40]!r} is not FastViTHD")
    values = PRESETS[name].to_json()
    if given.has("model_args"):
        given = given.object("model_args")
        unknown = given.values.keys() - values.keys() - set(TIMM_ARGUMENTS)
        if unknown:
            raise given.error(min(unknown), "is not supported")
    values |= {key: value for key, value in given.values.items() if key in values}
    if given.has("layers"):
        stages = len(given.integers("layers", 1, 64, most=8))
        if stages != len(values["se_downsamples"]):
            values["se_downsamples"] = [False] * stages
    return FastViTConfig.from_json(Fields(values, given.where or fields.where))
