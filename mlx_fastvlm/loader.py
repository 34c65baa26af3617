"""Load a model and its processor by name."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx

from mlx_mobileclip.checkpoints.hub import DEMO, Checkpoint, resolve
from mlx_mobileclip.checkpoints.safetensors import read_tensors
from mlx_mobileclip.checkpoints.weights import assign
from mlx_mobileclip.concurrency import register_thread
from mlx_mobileclip.cpu import process
from mlx_mobileclip.device import parse_dtype
from mlx_mobileclip.errors import CheckpointError, ConfigError
from mlx_mobileclip.gpu.elementwise import compile_all
from mlx_mobileclip.json_fields import read_json
from mlx_mobileclip.layers import prepare
from mlx_mobileclip.quantization import Quantization, quantize_parts

from .checkpoints.fastvlm import read_foreign
from .defaults import DEFAULT_MODEL
from .generation.constrained_loop import vocabulary
from .models.config import MODEL_TYPE, FastVLMConfig
from .models.fastvlm import PARTS, FastVLM
from .models.sharding import shard
from .preprocess import tokenizer as qwen2_tokenizer
from .preprocess.processor import Processor
from .preprocess.tokenizer import Tokenizer

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
        dtype: "float16", "bfloat16" or "float32"; by default float16 on a GPU and float32 on
            a CPU. The tower loses 8 times more precision in bfloat16 than in float16.
        vision_from: Checkpoint to take the image tower from, for exports without one, or
            instead of their Core ML package. Model size and training stage must match.
        quantize: Quantise the weights after loading, such as Quantization(bits=4). The
            floats are in memory first, which a checkpoint quantised by `convert` avoids.
        parts: What to quantise: "decoder" (with its embedding), "projector" and "vision".

    Returns:
        The model, evaluated so that any thread can use it, and its processor.

    Raises:
        ModelError: or one of its subclasses, naming what cannot be used.
    """
    result = load_checkpoint(find_checkpoint(model, revision), dtype, vision_from)
    if quantize is not None:
        quantize_parts(result[0], PARTS, parts, quantize)
    return result


def find_checkpoint(model: str | os.PathLike[str], revision: str | None = None) -> Checkpoint:
    """Find the checkpoint that `load` would read, and download it if necessary."""
    return resolve(model, revision, DEMO_DIRECTORY)


def load_checkpoint(
    checkpoint: Checkpoint,
    dtype: str | mx.Dtype | None = None,
    vision_from: str | os.PathLike[str] | None = None,
    group: mx.distributed.Group | None = None,
    *,
    constrained: bool = False,
) -> tuple[FastVLM, Processor]:
    """Load a checkpoint that is already on disk; with a group, this rank's part of the decoder.

    If answers will be constrained, the table that this needs is begun in a thread.
    """
    register_thread()
    config, tensors = read_canonical(checkpoint, vision_from)
    model = FastVLM(config)
    if group is not None:
        tensors = shard(model, tensors, group, checkpoint.name)
    model.eval()
    with ThreadPoolExecutor(2) as executor:  # reading 152k tokens takes half a second
        tokenizer = executor.submit(read_tokenizer, checkpoint, config)
        executor.submit(compile_all, parse_dtype(dtype))
        if constrained:
            executor.submit(lambda: vocabulary(tokenizer.result()))
        assign(model, tensors, parse_dtype(dtype), checkpoint.name)
        prepare(model)
    process.configure()
    return model, Processor(tokenizer.result(), config)


def read_canonical(
    checkpoint: Checkpoint, vision_from: str | os.PathLike[str] | None = None
) -> Canonical:
    """Read config and lazy tensors in canonical form, converting other layouts."""
    path = checkpoint.path / "config.json"
    values = read_json(path)
    if values.get("model_type") != MODEL_TYPE:
        vision = None if vision_from is None else find_checkpoint(vision_from)
        return read_foreign(checkpoint, values, vision)
    if vision_from is not None:
        raise CheckpointError(
            f"{checkpoint.name}: already has an image tower; leave out --vision-from"
        )
    return FastVLMConfig.from_json(values, str(path)), read_tensors(checkpoint.path)


def read_tokenizer(checkpoint: Checkpoint, config: FastVLMConfig) -> Tokenizer:
    """Read the checkpoint's tokenizer; raises ConfigError if it exceeds the vocabulary."""
    tokenizer = qwen2_tokenizer.read(checkpoint.path)
    if tokenizer.size > config.text.vocab_size:
        raise ConfigError(
            f"{checkpoint.name}: the tokenizer has ids up to {tokenizer.size - 1} but the "
            f"vocabulary ends at {config.text.vocab_size}; its files belong to different models"
        )
    return tokenizer
