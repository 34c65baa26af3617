"""From what the user typed to a model that is ready to embed."""

import os
from collections.abc import Sequence

import mlx.core as mx

from .checkpoints.hub import Checkpoint, resolve_file
from .checkpoints.mobileclip import read_foreign
from .checkpoints.safetensors import read_tensors
from .checkpoints.weights import assign
from .cpu import process
from .defaults import DEFAULT_MODEL
from .device import parse_dtype
from .errors import ConfigError
from .json_fields import read_json
from .models.clip import MODEL_TYPE, PARTS, MobileCLIP, MobileCLIPConfig
from .preprocess.processor import Processor
from .preprocess.tokenizer import CONTEXT_LENGTH, Tokenizer, clip_tokenizer, read_merges
from .quantization import Quantization, quantize_parts


def load(
    model: str | os.PathLike[str] = DEFAULT_MODEL,
    *,
    variant: str | None = None,
    revision: str | None = None,
    dtype: str | mx.Dtype | None = None,
    quantize: Quantization | None = None,
    parts: Sequence[str] = tuple(PARTS),
) -> tuple[MobileCLIP, Processor]:
    """Load any MobileCLIP checkpoint: converted, Apple's, open_clip's or timm's.

    Args:
        model: Repository id (`org/name`), directory, file (.pt, .bin, .safetensors), or "demo",
            the small model that comes with this package (a directory of that name is "./demo").
        variant: Which published model the checkpoint is built like, such as "MobileCLIP2-S0";
            needed when its name does not tell. What the variant decides (attention mask, stem,
            preprocessing) cannot be seen in the tensors.
        revision: Branch, tag or commit of the repository.
        dtype: "float16", "bfloat16" or "float32"; float16 on a GPU and float32 on a CPU if not
            given.
        quantize: Pack the weights once they are loaded, such as Quantization(bits=8).
        parts: Which of "image" and "text" to pack.

    Returns:
        The model, its weights evaluated so that any thread can use it, and its processor.

    Raises:
        ModelError: or one of its subclasses, naming what cannot be used.
    """
    result = load_checkpoint(resolve_file(model, revision), variant, dtype)
    if quantize is not None:
        quantize_parts(result[0], PARTS, parts, quantize)
    return result


def load_checkpoint(
    checkpoint: Checkpoint, variant: str | None = None, dtype: str | mx.Dtype | None = None
) -> tuple[MobileCLIP, Processor]:
    """`load` for a checkpoint that is already on disk."""
    config, tensors = read_canonical(checkpoint, variant)
    words = read_tokenizer(checkpoint, config)
    model = MobileCLIP(config)
    model.eval()
    assign(model, tensors, parse_dtype(dtype), checkpoint.name)
    process.configure()
    return model, Processor(config.preprocess, words)


def read_canonical(
    checkpoint: Checkpoint, variant: str | None = None
) -> tuple[MobileCLIPConfig, dict[str, mx.array]]:
    """Config and lazy tensors in canonical form, converted on the way if need be."""
    path = checkpoint.path / "config.json"
    values = read_json(path) if path.is_file() else {}
    if values.get("model_type") != MODEL_TYPE:
        return read_foreign(checkpoint, variant)
    if variant is not None:
        raise ConfigError(f"{checkpoint.name}: is converted and says what it is; leave out variant")
    return MobileCLIPConfig.from_json(values, str(path)), read_tensors(checkpoint.path)


def read_tokenizer(checkpoint: Checkpoint, config: MobileCLIPConfig) -> Tokenizer | None:
    """The tokenizer of the checkpoint's own vocabulary or length; None where it is CLIP's."""
    text = config.text
    if text is None:
        return None
    merges = read_merges(checkpoint.path, text.vocab_size)
    if merges is not None:
        return Tokenizer(merges, text.context_length)
    return None if text.context_length == CONTEXT_LENGTH else clip_tokenizer(text.context_length)
