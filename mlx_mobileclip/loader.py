"""Load a MobileCLIP checkpoint as a model and its processor."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx

from .checkpoints.hub import Checkpoint, resolve_file
from .checkpoints.mobileclip import read_foreign
from .checkpoints.safetensors import read_tensors
from .checkpoints.stated_config import with_preprocessing
from .checkpoints.weights import assign
from .concurrency import register_thread
from .cpu import process
from .defaults import DEFAULT_MODEL
from .device import parse_dtype
from .errors import ConfigError
from .json_fields import read_json
from .layers import prepare
from .models.clip import MODEL_TYPE, PARTS, MobileCLIP, MobileCLIPConfig, PreprocessConfig
from .paths import user_path
from .preprocess.processor import Processor
from .preprocess.tokenizer import (
    CLIP_VOCABULARY,
    CONTEXT_LENGTH,
    OWN_MERGES_FILE,
    Merges,
    Tokenizer,
    clip_tokenizer,
    read_merges,
)
from .quantization import Quantization, quantize_parts

HF_MERGES_START = b"#version"


def load(
    model: str | os.PathLike[str] = DEFAULT_MODEL,
    *,
    variant: str | None = None,
    revision: str | None = None,
    dtype: str | mx.Dtype | None = None,
    quantize: Quantization | None = None,
    parts: Sequence[str] = tuple(PARTS),
    preprocess: PreprocessConfig | None = None,
    config: str | os.PathLike[str] | None = None,
) -> tuple[MobileCLIP, Processor]:
    """Load any MobileCLIP checkpoint: converted, Apple's, open_clip's or timm's.

    Args:
        model: Repository id (`org/name`), directory (also of Core ML packages), file (.pt, .bin,
            .safetensors), or "demo", the small model included in this package (write "./demo" for
            a directory of that name).
        variant: Published model with the architecture of the checkpoint, such as "MobileCLIP2-S0";
            needed if neither the checkpoint's name nor its config states it. Attention mask, stem
            and preprocessing depend on it and cannot be inferred from the tensors.
        revision: Branch, tag or commit of the repository.
        dtype: "float16", "bfloat16" or "float32"; float16 on a GPU and float32 on a CPU if not
            given.
        quantize: Quantise the weights after loading, such as Quantization(bits=8).
        parts: Parts to quantise: "image" and "text".
        preprocess: Image preprocessing, overriding that of the checkpoint.
        config: JSON file that describes the checkpoint (open_clip's, Apple's or timm's), instead
            of those beside its weights.

    Returns:
        The model, with its weights evaluated so that any thread can use it, and its processor.

    Raises:
        ModelError: the checkpoint or an argument cannot be used; mostly one of its subclasses.
    """
    loaded = load_checkpoint(resolve_file(model, revision), variant, dtype, preprocess, config)
    if quantize is not None:
        quantize_parts(loaded[0], PARTS, parts, quantize)
    return loaded


def load_checkpoint(
    checkpoint: Checkpoint,
    variant: str | None = None,
    dtype: str | mx.Dtype | None = None,
    preprocess: PreprocessConfig | None = None,
    config: str | os.PathLike[str] | None = None,
) -> tuple[MobileCLIP, Processor]:
    """`load` for a checkpoint that is already on disk."""
    register_thread()
    return _assemble(checkpoint, read_canonical(checkpoint, variant, preprocess, config), dtype)


def load_text_tower(
    model: str | os.PathLike[str],
    *,
    variant: str | None = None,
    revision: str | None = None,
    dtype: str | mx.Dtype | None = None,
    preprocess: PreprocessConfig | None = None,
    config: str | os.PathLike[str] | None = None,
) -> tuple[MobileCLIP, Processor]:
    """`load` without reading the image tower; the model can only embed texts."""
    register_thread()
    checkpoint = resolve_file(model, revision)
    canonical = read_canonical(checkpoint, variant, preprocess, config)
    return _assemble(checkpoint, canonical, dtype, with_images=False)


def _assemble(
    checkpoint: Checkpoint,
    canonical: tuple[MobileCLIPConfig, dict[str, mx.array]],
    dtype: str | mx.Dtype | None,
    *,
    with_images: bool = True,
) -> tuple[MobileCLIP, Processor]:
    """The model of a config and its tensors, with or without the image tower."""
    config, tensors = canonical
    tokenizer = read_tokenizer(checkpoint, config)
    model = MobileCLIP(config)
    model.eval()
    if not with_images:
        model.pop("image")
        tensors = {k: v for k, v in tensors.items() if not k.startswith(PARTS["image"])}
    assign(model, tensors, parse_dtype(dtype), checkpoint.name)
    prepare(model)
    process.configure()
    return model, Processor(config.preprocess, tokenizer)


def read_canonical(
    checkpoint: Checkpoint,
    variant: str | None = None,
    preprocess: PreprocessConfig | None = None,
    config: str | os.PathLike[str] | None = None,
) -> tuple[MobileCLIPConfig, dict[str, mx.array]]:
    """Read the config and lazy tensors, converted to canonical form if necessary."""
    path = checkpoint.directory / "config.json"
    config_path = None if config is None else user_path(config)
    values = read_json(path) if path.is_file() and config_path is None else {}
    if values.get("model_type") != MODEL_TYPE:
        return read_foreign(checkpoint, variant, preprocess, config_path)
    if checkpoint.path.is_file():
        raise ConfigError(
            f"{checkpoint.name}: is in the directory of a converted checkpoint; load the directory "
            f"{checkpoint.directory}, or move the file elsewhere if it does not belong to it"
        )
    if variant is not None:
        raise ConfigError(f"{checkpoint.name}: is converted and has a variant; leave out variant")
    canonical = MobileCLIPConfig.from_json(values, str(path))
    if preprocess is not None:
        canonical = with_preprocessing(canonical, asdict(preprocess), "preprocess")
    return canonical, read_tensors(checkpoint.path)


def read_tokenizer(checkpoint: Checkpoint, config: MobileCLIPConfig) -> Tokenizer | None:
    """Read the tokenizer of a vocabulary or context length unlike CLIP's; None if it is CLIP's."""
    text = config.text
    if text is None:
        return None
    merges = read_own_merges(checkpoint, text.vocab_size)
    if merges is not None:
        return Tokenizer(merges, text.context_length)
    return None if text.context_length == CONTEXT_LENGTH else clip_tokenizer(text.context_length)


def read_own_merges(checkpoint: Checkpoint, vocab_size: int) -> Merges | None:
    """Read the merges of a checkpoint with its own vocabulary; None if it is CLIP's."""
    if not _has_own_merges(checkpoint.directory, vocab_size):
        return None
    return read_merges(checkpoint.directory, vocab_size)


def _has_own_merges(directory: Path, vocab_size: int) -> bool:
    """Whether the checkpoint may have its own vocabulary, not CLIP's with unused embedding rows.

    open_clip tokenizes with CLIP's vocabulary, however many rows the embedding has. The merges.txt
    in its repositories is CLIP's, as Hugging Face writes it.
    """
    if vocab_size <= CLIP_VOCABULARY:
        return True
    path = directory / OWN_MERGES_FILE
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return not file.read(len(HF_MERGES_START)).startswith(HF_MERGES_START)
