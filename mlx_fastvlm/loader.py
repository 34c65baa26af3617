"""From what the user typed to a model that is ready to answer."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx

from mlx_mobileclip.checkpoints.hub import DEMO, Checkpoint, resolve
from mlx_mobileclip.checkpoints.safetensors import read_tensors
from mlx_mobileclip.checkpoints.weights import assign
from mlx_mobileclip.concurrency import enter
from mlx_mobileclip.cpu import process
from mlx_mobileclip.device import parse_dtype
from mlx_mobileclip.errors import CheckpointError, ConfigError
from mlx_mobileclip.json_fields import read_json
from mlx_mobileclip.layers import prepare
from mlx_mobileclip.quantization import Quantization, quantize_parts

from .checkpoints.fastvlm import read_foreign
from .defaults import DEFAULT_MODEL
from .models.config import MODEL_TYPE, FastVLMConfig
from .models.fastvlm import PARTS, FastVLM
from .preprocess import tokenizer
from .preprocess.processor import Processor

DEMO_DIRECTORY = Path(__file__).parent / DEMO
Canonical = tuple[FastVLMConfig, dict[str, mx.array]]


def load(
    model: str | os.PathLike[str] = DEFAULT_MODEL,
    *,
    revision: str | None = None,
    dtype: str | mx.Dtype | None = None,
    vision_from: str | os.PathLike[str] | None = None,
    quantize: Quantization | None = None,
    parts: Sequence[str] = ("decoder",),
) -> tuple[FastVLM, Processor]:
    """Load any FastVLM checkpoint: converted, Apple's, transformers' or mlx-vlm's.

    Args:
        model: Repository id (`org/name`), directory, or "demo", the small model that comes with
            this package (a directory of that name is "./demo").
        revision: Branch, tag or commit of the repository.
        dtype: "float16", "bfloat16" or "float32"; float16 on a GPU and float32 on a CPU if not
            given. The tower loses 8 times more to bfloat16 than to float16.
        vision_from: Checkpoint to take the image tower from, for exports that carry none, or
            instead of the Core ML package in Apple's. It must be the same size and training stage.
        quantize: Quantise the weights after loading, such as Quantization(bits=4). The floats are
            in memory for a moment, which a checkpoint quantised by `convert` avoids.
        parts: What to quantise: "decoder" (with its embedding), "projector" and "vision".

    Returns:
        The model, its weights evaluated so that any thread can use it, and its processor.

    Raises:
        ModelError: or one of its subclasses, naming what cannot be used.
    """
    result = load_checkpoint(find_checkpoint(model, revision), dtype, vision_from)
    if quantize is not None:
        quantize_parts(result[0], PARTS, parts, quantize)
    return result


def find_checkpoint(model: str | os.PathLike[str], revision: str | None = None) -> Checkpoint:
    """The checkpoint that `load` would read, fetched if need be."""
    return resolve(model, revision, DEMO_DIRECTORY)


def load_checkpoint(
    checkpoint: Checkpoint,
    dtype: str | mx.Dtype | None = None,
    vision_from: str | os.PathLike[str] | None = None,
) -> tuple[FastVLM, Processor]:
    """`load` for a checkpoint that is already on disk."""
    enter()
    config, tensors = read_canonical(checkpoint, vision_from)
    model = FastVLM(config)
    model.eval()
    with ThreadPoolExecutor(1) as beside:  # half a second for 152k tokens; MLX lets it run
        words = beside.submit(read_tokenizer, checkpoint, config)
        assign(model, tensors, parse_dtype(dtype), checkpoint.name)
        prepare(model)
    process.configure()
    return model, Processor(words.result(), config)


def read_canonical(
    checkpoint: Checkpoint, vision_from: str | os.PathLike[str] | None = None
) -> Canonical:
    """Config and lazy tensors in canonical form, converted on the way if need be."""
    path = checkpoint.path / "config.json"
    values = read_json(path)
    if values.get("model_type") != MODEL_TYPE:
        vision = None if vision_from is None else find_checkpoint(vision_from)
        return read_foreign(checkpoint, values, vision)
    if vision_from is not None:
        raise CheckpointError(
            f"{checkpoint.name}: has an image tower of its own; leave out --vision-from"
        )
    return FastVLMConfig.from_json(values, str(path)), read_tensors(checkpoint.path)


def read_tokenizer(checkpoint: Checkpoint, config: FastVLMConfig) -> tokenizer.Tokenizer:
    """The checkpoint's tokenizer, which must not know more ids than the embedding has rows."""
    words = tokenizer.read(checkpoint.path)
    if words.size > config.text.vocab_size:
        raise ConfigError(
            f"{checkpoint.name}: the tokenizer has ids up to {words.size - 1} but the vocabulary "
            f"ends at {config.text.vocab_size}; its files belong to different models"
        )
    return words
