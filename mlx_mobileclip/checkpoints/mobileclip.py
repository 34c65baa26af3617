"""MobileCLIP checkpoints of every known layout, read as canonical config and tensors.

Common names are timm's for image towers and open_clip's for the rest. Source of the maps:
apple/ml-mobileclip 4144bb1, open_clip 3.3.0 `convert.py`, timm 1.0.31 `timm/models/fastvit.py`.
"""

from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import CheckpointError, ConfigError
from ..json_fields import Fields, read_json
from ..models.clip import MobileCLIPConfig, PreprocessConfig
from ..models.text import TextConfig
from ..models.variants import VARIANTS, variant_named
from ..models.vit import STEM_SIZES, ViTConfig
from .apple_names import TEXT_NAMES, apple_name
from .hub import Checkpoint
from .layout import Layout
from .published_names import published_variant
from .reparameterize import fold_conv_norm, fold_fastvit, fold_text_block
from .safetensors import read_safetensors
from .source import Source, without_prefixes
from .torch_pickle import read_torch

NEVER_USED = r"\.num_batches_tracked$|(^|\.)attn_mask$"
WRAPPERS = ("module.", "_orig_mod.", "model.", "timm_model.")  # of training and of other code


# The parts are "image" and "text".
MOBILECLIP_LAYOUTS = (
    Layout("apple", {"image": "image_encoder.model.", "text": "text_encoder."}, apple=True),
    Layout("open_clip", {"image": "visual.trunk.", "text": "text."}, apple=False),
    Layout("timm", {"image": ""}, apple=False),
)
TIMM_MARKERS = ("stem.", "patch_embed.")  # beginnings of names in a bare tower of timm's


def read_foreign(
    checkpoint: Checkpoint, variant: str | None = None
) -> tuple[MobileCLIPConfig, dict[str, mx.array]]:
    """Read a source checkpoint as canonical config and canonical tensors, mostly lazy.

    Args:
        checkpoint: A directory, or a file of weights.
        variant: Which published model it is built like; by default as its name says.

    Raises:
        CheckpointError: there are no weights, or tensors are missing, left over or misshapen.
        ConfigError: the variant is not known, or disagrees with the checkpoint's own config.
    """
    config = _config(checkpoint, _weights_file(checkpoint), variant)
    tensors, layout = read_source(checkpoint)
    if "text" not in layout.prefixes:
        config = replace(config, text=None)
    record = {"model": checkpoint.name, "revision": checkpoint.revision, "layout": layout.name}
    config = replace(config, source=record)
    where = f"{checkpoint.name} as {config.variant}"
    return config, canonical_tensors(tensors, config, layout, where)


def read_source(checkpoint: Checkpoint) -> tuple[dict[str, mx.array], Layout]:
    """Lazy tensors of a source checkpoint under their own names, and which layout those are of.

    Raises:
        CheckpointError: there are no weights, they are damaged, or of no known layout.
    """
    file = _weights_file(checkpoint)
    tensors = read_safetensors(file) if file.suffix == ".safetensors" else read_torch(file)
    tensors = without_prefixes(tensors, WRAPPERS)
    return tensors, _detect(tensors, checkpoint.name)


def canonical_tensors(
    tensors: dict[str, mx.array], config: MobileCLIPConfig, layout: Layout, where: str
) -> dict[str, mx.array]:
    """Turn the tensors of a layout into those of `MobileCLIP`; takes `tensors` over.

    Raises:
        CheckpointError: naming what is missing, left over or misshapen.
    """
    scale = tensors.get("logit_scale")
    if scale is not None and scale.shape == (1,):  # open_clip's nonscalar_logit_scale
        tensors["logit_scale"] = scale.reshape(())
    source = mobileclip_source(tensors, config, layout, where)
    vit = isinstance(config.image, ViTConfig)
    trunk = (
        _vit(source, config.image, layout)
        if isinstance(config.image, ViTConfig)
        else fold_fastvit(source, config.image, "image.")
    )
    result = {f"image.trunk.{name}": tensor for name, tensor in trunk.items()}
    head = "image.head" if vit else "image.head.fc"
    result |= _head(source, head, config, layout)
    if config.text is not None:
        text = _text(source, config.text, config.embed_dim, layout)
        result |= {f"text.{name}": tensor for name, tensor in text.items()}
        result["logit_scale"] = source.take("logit_scale", ())
    source.drop(NEVER_USED)
    source.finish()
    return result


def _weights_file(checkpoint: Checkpoint) -> Path:
    """The one file of a checkpoint that holds its weights; safetensors before pickles."""
    if checkpoint.path.is_file():
        return checkpoint.path
    for suffix in (".safetensors", ".bin", ".pt"):
        found = sorted(
            p
            for p in checkpoint.path.iterdir()
            if p.suffix == suffix and p.name[0] != "." and p.is_file()
        )
        if len(found) > 1:  # open_clip's repositories may hold a bare trunk as well
            found = [p for p in found if p.name.startswith("open_clip")] or found
        if len(found) > 1:
            names = ", ".join(p.name for p in found[:4])
            raise CheckpointError(f"{checkpoint.name}: holds {names}; give the path of one of them")
        if found:
            return found[0]
    raise CheckpointError(
        f"{checkpoint.name}: holds no .safetensors, .bin or .pt file; "
        "give the file or directory of a checkpoint"
    )


def _config(checkpoint: Checkpoint, file: Path, variant: str | None) -> MobileCLIPConfig:
    """The variant's config, with the preprocessing that the checkpoint states."""
    if variant is not None:
        name = variant_named(variant)
        if name is None:
            raise ConfigError(f"variant {variant[:40]!r} is not one of {', '.join(VARIANTS)}")
    else:
        name = published_variant(checkpoint.name)
        if name is None and checkpoint.revision is None:
            name = published_variant(file.name)  # a local directory may be called anything
        if name is None:
            raise ConfigError(
                f"{checkpoint.name}: its name is not that of a published model; say which one it "
                f"is built like with --variant (variant= in Python): {', '.join(VARIANTS)}"
            )
    config = VARIANTS[name]
    for config_name in ("config.json", "open_clip_config.json"):
        path = checkpoint.path / config_name  # what lies beside a single file may be another's
        if path.is_file():
            config = _stated(Fields(read_json(path), str(path)), config)
    return config


def _stated(fields: Fields, config: MobileCLIPConfig) -> MobileCLIPConfig:
    """Compare with what a JSON file of the checkpoint says, and take its preprocessing over."""
    model = fields.object("model_cfg") if fields.has("model_cfg") else fields
    if config.text is not None and model.has("text_cfg"):
        text = model.object("text_cfg")
        causal = config.text.causal
        if text.has("causal_masking"):
            causal = text.boolean("causal_masking")
        elif text.has("no_causal_mask"):
            causal = not text.boolean("no_causal_mask")
        if causal != config.text.causal:
            raise text.error(
                "causal mask",
                f"is {'on' if causal else 'off'}, unlike that of {config.variant}; "
                "choose the --variant it was trained as",
            )
    values: dict[str, Any] = asdict(config.preprocess)
    where = fields.where
    if model.has("vision_cfg") and model.object("vision_cfg").has("image_size"):
        values["image_size"] = model.object("vision_cfg").get("image_size")
    if fields.has("preprocess_cfg"):
        given = fields.object("preprocess_cfg")
        given.choice("resize_mode", ("shortest",), "shortest")
        stated = ("mean", "std", "interpolation")
        values |= {key: given.values[key] for key in stated if given.has(key)}
        where = given.where
    preprocess = PreprocessConfig.from_json(Fields(values, where))
    size = preprocess.image_size
    if isinstance(config.image, ViTConfig) and size != config.image.image_size:
        raise fields.error("image_size", f"{size} is not the {config.image.image_size} it is for")
    return replace(config, preprocess=preprocess)


def _detect(keys: Iterable[str], where: str) -> Layout:
    keys = list(keys)
    for layout in MOBILECLIP_LAYOUTS:
        markers = layout.prefixes["image"] or TIMM_MARKERS
        if any(key.startswith(markers) for key in keys):
            return layout
    raise CheckpointError(
        f"{where}: its tensors ({', '.join(sorted(keys)[:3])[:200]}, ...) are named like no known "
        f"MobileCLIP; known are {', '.join(layout.name for layout in MOBILECLIP_LAYOUTS)}"
    )


def mobileclip_source(
    tensors: dict[str, mx.array], config: MobileCLIPConfig, layout: Layout, where: str
) -> Source:
    """The tensors under common names: image.*, text.*, logit_scale."""

    def name(common: str) -> str:
        part, _, rest = common.partition(".")
        if part == "image":
            return layout.prefixes[part] + layout.tower_name(rest, config.image)
        if part == "text":
            return layout.prefixes[part] + (apple_name(rest, TEXT_NAMES) if layout.apple else rest)
        return common

    return Source(tensors, name, where)


def _head(
    source: Source, src: str, config: MobileCLIPConfig, layout: Layout
) -> dict[str, mx.array]:
    """The projection. Apple's is transposed; it has no bias, and open_clip's is often left out."""
    inputs, outputs = config.image.features, config.embed_dim
    if layout.apple:
        weight = source.take(f"{src}.weight", (inputs, outputs)).T
    else:
        weight = source.take(f"{src}.weight", (outputs, inputs))
    bias = mx.zeros((outputs,))
    if source.has(f"{src}.bias"):
        bias = source.take(f"{src}.bias", (outputs,))
    return {"image.projection.weight": weight, "image.projection.bias": bias}


def _vit(source: Source, config: ViTConfig, layout: Layout) -> dict[str, mx.array]:
    """Canonical tensors of a vision transformer."""
    D, result = config.width, dict[str, mx.array]()
    patch = config.stem == "patch"
    if patch:
        shape = (D, 3, config.patch_size, config.patch_size)
        weight = source.take("image.patch_embed.proj.weight", shape)
        result["stem.convs.0.weight"] = weight.transpose(0, 2, 3, 1)
        result |= _norm(source, "image.norm_pre", "norm_pre", D)
    else:
        widths, stem = (3, config.stem_width, config.stem_width, D), "image.patch_embed.backbone"
        for i, size in enumerate(STEM_SIZES):
            shape = (widths[i + 1], widths[i], size, size)
            norm = f"{stem}.{i}.bn" if i < len(STEM_SIZES) - 1 else None
            affine = fold_conv_norm(source, f"{stem}.{i}.conv", norm, shape)
            result[f"stem.convs.{i}.weight"], result[f"stem.convs.{i}.bias"] = affine
    result["class_token"] = source.take("image.cls_token", (1, 1, D)).reshape(D)
    rows = config.patches + patch
    leading = (1, 1) if layout.apple else (1,)
    result["positions"] = source.take("image.pos_embed", (*leading, rows, D)).reshape(rows, D)
    parts = {
        "norm1": "norm1",
        "qkv": "attn.qkv",
        "proj": "attn.proj",
        "norm2": "norm2",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
    }
    for i in range(config.layers):
        result |= _layer(source, f"image.blocks.{i}", f"layers.{i}", D, parts)
    return result | _norm(source, "image.norm", "norm", D)


def _text(
    source: Source, config: TextConfig, embed_dim: int, layout: Layout
) -> dict[str, mx.array]:
    """Canonical tensors of a text tower."""
    D, rows, result = config.width, config.context_length, dict[str, mx.array]()
    shape = (config.vocab_size, D)
    result["embedding.weight"] = source.take("text.token_embedding.weight", shape)
    leading = (1, 1) if layout.apple else ()
    positions = source.take("text.positional_embedding", (*leading, rows, D))
    result["positions"] = positions.reshape(rows, D)
    parts = {"norm1": "ln_1", "proj": "attn.out_proj", "norm2": "ln_2"}
    parts |= {"qkv": "attn.in_proj", "fc1": "mlp.c_fc", "fc2": "mlp.c_proj"}
    hybrid = config.rep_mixers
    for i in range(config.layers + 2 * hybrid):
        src, dst = f"text.transformer.resblocks.{i}", f"layers.{i}"
        if hybrid and i in (0, config.layers + 1):
            block = fold_text_block(source, src, D)
            result |= {f"{dst}.{name}": tensor for name, tensor in block.items()}
        else:
            result |= _layer(source, src, dst, D, parts)
    result |= _norm(source, "text.ln_final", "norm", D)
    projection = source.take("text.text_projection", (D, embed_dim))
    return result | {"projection.weight": projection.T}


def _layer(
    source: Source, src: str, dst: str, width: int, parts: dict[str, str]
) -> dict[str, mx.array]:
    """Canonical tensors of a transformer layer; `parts` maps our names to the common ones."""
    D, result = width, dict[str, mx.array]()
    for part in ("norm1", "norm2"):
        result |= _norm(source, f"{src}.{parts[part]}", f"{dst}.{part}", D)
    shapes = {"qkv": (3 * D, D), "proj": (D, D), "fc1": (4 * D, D), "fc2": (D, 4 * D)}
    for part, shape in shapes.items():
        # torch's fused attention writes in_proj_weight where others write qkv.weight.
        stem = f"{src}.{parts[part]}" + ("_" if parts[part].endswith("in_proj") else ".")
        result[f"{dst}.{part}.weight"] = source.take(f"{stem}weight", shape)
        result[f"{dst}.{part}.bias"] = source.take(f"{stem}bias", shape[:1])
    return result


def _norm(source: Source, src: str, dst: str, width: int) -> dict[str, mx.array]:
    return {f"{dst}.{name}": source.take(f"{src}.{name}", (width,)) for name in ("weight", "bias")}
