"""Read MobileCLIP checkpoints of every known layout as canonical config and tensors.

Common names are timm's for image towers and open_clip's for the rest. Source of the maps:
apple/ml-mobileclip 4144bb1, open_clip 3.3.0 `convert.py`, timm 1.0.31 `timm/models/fastvit.py`.
"""

import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import mlx.core as mx

from ..errors import CheckpointError, ConfigError
from ..json_fields import Fields, check_link, read_json
from ..models.clip import MobileCLIPConfig, PreprocessConfig
from ..models.text import TextConfig
from ..models.variants import VARIANTS, variant_named
from ..models.vit import STEM_SIZES, ViTConfig
from .apple_names import TEXT_NAMES, apple_name
from .core_ml.mobileclip import LAYOUT as CORE_ML
from .core_ml.mobileclip import find_towers, read_towers
from .hub import Checkpoint
from .layout import Layout
from .published_names import is_port, published_variant
from .reparameterize import fold_conv_norm, fold_fastvit, fold_text_block
from .safetensors import read_safetensors
from .source import Source
from .stated_config import (
    apply_config_file,
    described_variant,
    describes_a_model,
    with_preprocessing,
)
from .torch_pickle import read_torch

CONFIG_NAMES = ("config.json", "open_clip_config.json")
# Tensors without effect; the last is the update counter of PyTorch's AveragedModel.
NEVER_USED = r"\.num_batches_tracked$|(^|\.)attn_mask$|^n_averaged$"
# Names of the text tower in open_clip's models without a prefix for it ("custom_text": false).
TEXT_AT_ROOT = re.compile(
    r"(token_embedding\.|positional_embedding$|transformer\.|ln_final\.|text_projection$)"
)


# The parts are "image" and "text".
MOBILECLIP_LAYOUTS = (
    Layout("apple", {"image": "image_encoder.model.", "text": "text_encoder."}, apple=True),
    Layout("open_clip", {"image": "visual.trunk.", "text": "text."}, apple=False),
    Layout("timm", {"image": ""}, apple=False),
)
TIMM_MARKERS = ("stem.", "patch_embed.")  # prefixes of names in timm's bare towers


def read_foreign(
    checkpoint: Checkpoint,
    variant: str | None = None,
    preprocess: PreprocessConfig | None = None,
    config_path: Path | None = None,
) -> tuple[MobileCLIPConfig, dict[str, mx.array]]:
    """Read a source checkpoint as canonical config and tensors; most tensors stay lazy.

    Args:
        checkpoint: A directory, or a file of weights.
        variant: Published model with its architecture; by default from its name or config.
        preprocess: Image preprocessing, overriding that of the checkpoint.
        config_path: JSON file that describes it; by default those of its directory.

    Raises:
        CheckpointError: there are no weights, or tensors are missing, left over or misshapen.
        ConfigError: the variant is not known, or the config requires what is not supported.
    """
    core_ml = None if _weights_files(checkpoint) else find_towers(checkpoint, variant)
    if core_ml is None:
        file = _weights_file(checkpoint)
        config = _config(checkpoint, file, variant, preprocess, config_path)

        def check(tensors: dict[str, mx.array], layout: Layout) -> dict[str, mx.array]:
            return _to_canonical(checkpoint, config, tensors, layout)[1]

        tensors, layout = read_source(checkpoint, check)
    else:
        variant, towers = core_ml
        config = _config(checkpoint, checkpoint.path, variant, preprocess, config_path)
        tensors, layout = read_towers(checkpoint, towers, config), CORE_ML
    return _to_canonical(checkpoint, config, tensors, layout)


def _to_canonical(
    checkpoint: Checkpoint, config: MobileCLIPConfig, tensors: dict[str, mx.array], layout: Layout
) -> tuple[MobileCLIPConfig, dict[str, mx.array]]:
    """Complete the config for a layout, and convert its tensors to canonical form."""
    if "text" not in layout.prefixes:
        config = replace(config, text=None)
    record = {"model": checkpoint.name, "revision": checkpoint.revision, "layout": layout.name}
    config = replace(config, source=record)
    where = f"{checkpoint.name} as {config.variant}"
    return config, canonical_tensors(tensors, config, layout, where)


def read_source(
    checkpoint: Checkpoint, check: Callable[[dict[str, mx.array], Layout], object] | None = None
) -> tuple[dict[str, mx.array], Layout]:
    """Read the tensors of a source checkpoint under their own names, and detect their layout.

    Args:
        checkpoint: A directory, or a file of weights.
        check: Raises if names or shapes are not those of the model. Called before a PyTorch file
            is read, with lazy zeros for its tensors; safetensors are lazy anyway.

    Raises:
        CheckpointError: there are no weights, they are damaged, or their layout is unknown.
    """
    file = _weights_file(checkpoint)
    if file.suffix == ".safetensors":
        return _identify(read_safetensors(file), checkpoint.name)

    if check is None:
        return _identify(read_torch(file), checkpoint.name)

    def check_zeros(zeros: dict[str, mx.array]) -> None:
        check(*_identify(zeros, checkpoint.name))

    return _identify(read_torch(file, check_zeros, NEVER_USED), checkpoint.name)


def _identify(tensors: dict[str, mx.array], where: str) -> tuple[dict[str, mx.array], Layout]:
    """Detect the layout, and give the tensors its usual names and dtypes (float64 as float32)."""
    tensors = {
        key: value.astype(mx.float32, stream=mx.cpu) if value.dtype == mx.float64 else value
        for key, value in tensors.items()
        if key != "n_averaged"
    }
    tensors, layout = _detect(tensors, where)
    if "text" in layout.prefixes and not layout.apple:
        text = layout.prefixes["text"]
        tensors = {text * bool(TEXT_AT_ROOT.match(k)) + k: v for k, v in tensors.items()}
    return tensors, layout


def canonical_tensors(
    tensors: dict[str, mx.array], config: MobileCLIPConfig, layout: Layout, where: str
) -> dict[str, mx.array]:
    """Convert the tensors of a layout to those of `MobileCLIP`; `tensors` is emptied.

    Raises:
        CheckpointError: tensors are missing, left over or misshapen.
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


def _weights_files(checkpoint: Checkpoint) -> list[Path]:
    """Candidate weights files, all of one format; safetensors are preferred."""
    if checkpoint.path.is_file():
        return [checkpoint.path]
    for suffix in (".safetensors", ".bin", ".pt", ".pth", ".ckpt"):
        files = sorted(
            p
            for p in checkpoint.path.iterdir()
            if p.suffix == suffix and p.name[0] != "." and p.is_file()
        )
        if files:
            return files
    return []


def _weights_file(checkpoint: Checkpoint) -> Path:
    """The file with the weights of a checkpoint."""
    files = _weights_files(checkpoint)
    if len(files) > 1:  # open_clip's repositories may have a bare trunk as well
        files = [p for p in files if p.name.startswith("open_clip")] or files
    if len(files) > 1:
        names = ", ".join(p.name for p in files[:4])
        raise CheckpointError(f"{checkpoint.name}: has {names}; give the path of one of them")
    if not files:
        raise CheckpointError(
            f"{checkpoint.name}: has no .safetensors, .bin or .pt file, nor .pth or .ckpt, nor "
            "Core ML packages of MobileCLIP; give the file or directory of a checkpoint"
        )
    if files[0] != checkpoint.path:  # a file that the user named may be a link to anywhere
        check_link(files[0])
    return files[0]


def _config(
    checkpoint: Checkpoint,
    file: Path,
    variant: str | None,
    preprocess: PreprocessConfig | None,
    config_path: Path | None,
) -> MobileCLIPConfig:
    """The config of the variant, updated from the JSON files of the checkpoint."""
    paths = [config_path] if config_path else [checkpoint.directory / n for n in CONFIG_NAMES]
    files = [
        Fields(read_json(path, follow_links=config_path is not None), str(path))
        for path in paths
        if config_path or path.is_file()
    ]
    if preprocess is None:
        _refuse_other_config(checkpoint, files)
    described = [fields for fields in files if describes_a_model(fields)]
    names = [checkpoint.name]
    if checkpoint.revision is None:  # a local directory may be called anything
        names += [file.name] + [checkpoint.directory.name] * (checkpoint.path == file)
    published = next((name for name in names if published_variant(name)), None)
    if variant is not None:
        name = variant_named(variant)
        if name is None:
            raise ConfigError(f"variant {variant[:40]!r} is not one of {', '.join(VARIANTS)}")
    else:
        candidates = (
            published_variant(published) if published else None,
            *map(described_variant, described),
        )
        name = next((candidate for candidate in candidates if candidate), None)
        if name is None:
            config_too = ", nor does its config name a tower (timm_model_name)" if described else ""
            raise ConfigError(
                f"{checkpoint.name}: its name is not that of a published model{config_too}; choose "
                "the one with its architecture with --variant (variant= in Python): "
                f"{', '.join(VARIANTS)}"
            )
    port = published is not None and is_port(published) and published_variant(published) == name
    config = VARIANTS[name]
    for fields in described:
        config = apply_config_file(
            fields, config, VARIANTS, port=port, with_preprocess=preprocess is None
        )
    if preprocess is not None:
        config = with_preprocessing(config, asdict(preprocess), "preprocess")
    return config


def _refuse_other_config(checkpoint: Checkpoint, files: list[Fields]) -> None:
    """Refuse a weights file beside the config of another kind of model."""
    if checkpoint.path.is_dir() or any(describes_a_model(fields) for fields in files):
        return
    for fields in files:
        if fields.has("model_type"):
            raise ConfigError(
                f"{fields.where}: is the config of another kind of model "
                f"({fields.string('model_type')[:40]!r}); put {checkpoint.path.name} into a "
                "separate directory, or give --preprocess or --config (preprocess= or config= "
                "in Python)"
            )


def _detect(tensors: dict[str, mx.array], where: str) -> tuple[dict[str, mx.array], Layout]:
    """Detect the layout; returns it, and the tensors without a prefix common to all names."""
    ends = [0]
    first, last = (end(tensors, default="").split(".")[:-1] for end in (min, max))
    for a, b in zip(first, last, strict=False):
        if a != b:
            break
        ends.append(ends[-1] + len(a) + 1)
    for end in ends:
        for layout in MOBILECLIP_LAYOUTS:
            markers = layout.prefixes["image"] or TIMM_MARKERS
            if any(key.startswith(markers, end) for key in tensors):
                return {key[end:]: tensor for key, tensor in tensors.items()}, layout
    raise CheckpointError(
        f"{where}: its tensors ({', '.join(sorted(tensors)[:3])[:200]}, ...) are named like no "
        f"known MobileCLIP layout ({', '.join(layout.name for layout in MOBILECLIP_LAYOUTS)})"
    )


def mobileclip_source(
    tensors: dict[str, mx.array], config: MobileCLIPConfig, layout: Layout, where: str
) -> Source:
    """A source with common names: image.*, text.*, logit_scale."""

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
    """The projection. Apple's is transposed and has no bias; open_clip's bias is optional."""
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
    """Canonical tensors of a transformer layer; `parts` maps canonical names to common ones."""
    D, result = width, dict[str, mx.array]()
    for part in ("norm1", "norm2"):
        result |= _norm(source, f"{src}.{parts[part]}", f"{dst}.{part}", D)
    shapes = {"qkv": (3 * D, D), "proj": (D, D), "fc1": (4 * D, D), "fc2": (D, 4 * D)}
    for part, shape in shapes.items():
        # PyTorch's fused attention has in_proj_weight instead of qkv.weight.
        stem = f"{src}.{parts[part]}" + ("_" if parts[part].endswith("in_proj") else ".")
        result[f"{dst}.{part}.weight"] = source.take(f"{stem}weight", shape)
        result[f"{dst}.{part}.bias"] = source.take(f"{stem}bias", shape[:1])
    return result


def _norm(source: Source, src: str, dst: str, width: int) -> dict[str, mx.array]:
    return {f"{dst}.{name}": source.take(f"{src}.{name}", (width,)) for name in ("weight", "bias")}
