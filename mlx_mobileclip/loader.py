"""From what the user typed to a model that is ready to embed."""

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
from .concurrency import enter
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
            .safetensors), or "demo", the small model that comes with this package (a directory of
            that name is "./demo").
        variant: Which published model the checkpoint is built like, such as "MobileCLIP2-S0";
            needed when neither its name nor a config beside it tells. What the variant decides
            (attention mask, stem, preprocessing) cannot be seen in the tensors.
        revision: Branch, tag or commit of the repository.
        dtype: "float16", "bfloat16" or "float32"; float16 on a GPU and float32 on a CPU if not
            given.
        quantize: Quantise the weights after loading, such as Quantization(bits=8).
        parts: What to quantise: "image" and "text".
        preprocess: How images are prepared, in place of what the checkpoint states.
        config: JSON file that describes the checkpoint (open_clip's, Apple's or timm's), in place
            of those that lie beside its weights.

    Returns:
        The model, its weights evaluated so that any thread can use it, and its processor.

    Raises:
        ModelError: or one of its subclasses, naming what cannot be used.
    """
    result = load_checkpoint(resolve_file(model, revision), variant, dtype, preprocess, config)
    if quantize is not None:
        quantize_parts(result[0], PARTS, parts, quantize)
    return result


def load_checkpoint(
    checkpoint: Checkpoint,
    variant: str | None = None,
    dtype: str | mx.Dtype | None = None,
    preprocess: PreprocessConfig | None = None,
    config: str | os.PathLike[str] | None = None,
) -> tuple[MobileCLIP, Processor]:
    """`load` for a checkpoint that is already on disk."""
    enter()
    found, tensors = read_canonical(checkpoint, variant, preprocess, config)
    words = read_tokenizer(checkpoint, found)
    model = MobileCLIP(found)
    model.eval()
    assign(model, tensors, parse_dtype(dtype), checkpoint.name)
    prepare(model)
    process.configure()
    return model, Processor(found.preprocess, words)


def read_canonical(
    checkpoint: Checkpoint,
    variant: str | None = None,
    preprocess: PreprocessConfig | None = None,
    config: str | os.PathLike[str] | None = None,
) -> tuple[MobileCLIPConfig, dict[str, mx.array]]:
    """Config and lazy tensors in canonical form, converted on the way if need be."""
    path = checkpoint.directory / "config.json"
    stated = None if config is None else user_path(config)
    values = read_json(path) if path.is_file() and stated is None else {}
    if values.get("model_type") != MODEL_TYPE:
        return read_foreign(checkpoint, variant, preprocess, stated)
    if checkpoint.path.is_file():
        raise ConfigError(
            f"{checkpoint.name}: lies in the directory of a converted checkpoint; give the "
            f"directory, {checkpoint.directory}, if it is of it, else move the file elsewhere"
        )
    if variant is not None:
        raise ConfigError(f"{checkpoint.name}: is converted and says what it is; leave out variant")
    found = MobileCLIPConfig.from_json(values, str(path))
    if preprocess is not None:
        found = with_preprocessing(found, asdict(preprocess), "preprocess")
    return found, read_tensors(checkpoint.path)


def read_tokenizer(checkpoint: Checkpoint, config: MobileCLIPConfig) -> Tokenizer | None:
    """The tokenizer of the checkpoint's own vocabulary or length; None where it is CLIP's."""
    text = config.text
    if text is None:
        return None
    merges = read_own_merges(checkpoint, text.vocab_size)
    if merges is not None:
        return Tokenizer(merges, text.context_length)
    return None if text.context_length == CONTEXT_LENGTH else clip_tokenizer(text.context_length)


def read_own_merges(checkpoint: Checkpoint, vocab_size: int) -> Merges | None:
    """The merges of a checkpoint whose vocabulary is its own; None where it is CLIP's."""
    if not _has_own_merges(checkpoint.directory, vocab_size):
        return None
    return read_merges(checkpoint.directory, vocab_size)


def _has_own_merges(directory: Path, vocab_size: int) -> bool:
    """Whether a vocabulary is the checkpoint's own, rather than CLIP's with rows left over.

    open_clip cuts every text with CLIP's vocabulary, however many rows the embedding has; the
    merges.txt in its repositories is CLIP's as Hugging Face writes it.
    """
    if vocab_size <= CLIP_VOCABULARY:
        return True
    path = directory / OWN_MERGES_FILE
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return not file.read(len(HF_MERGES_START)).startswith(HF_MERGES_START)
