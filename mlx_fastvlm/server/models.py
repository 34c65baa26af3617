"""Load the models of a server, in the engine's thread."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from mlx_mobileclip.checkpoints.hub import is_repository
from mlx_mobileclip.loader import load as load_clip
from mlx_mobileclip.models.clip import MobileCLIP
from mlx_mobileclip.preprocess.processor import Processor as ClipProcessor

from ..generation.batch import BatchGenerator
from ..generation.image_cache import ImageCache
from ..generation.prompt_cache import PromptCache
from ..loader import find_checkpoint, load_checkpoint
from ..models.fastvlm import FastVLM
from ..preprocess.processor import Processor
from .engine import Batch


@dataclass(frozen=True, slots=True)
class Models:
    """The loaded FastVLM, and optionally a MobileCLIP.

    Attributes:
        new_batch: Creates an empty batch for FastVLM.
    """

    model: FastVLM
    processor: Processor
    clip: tuple[MobileCLIP, ClipProcessor] | None
    new_batch: Callable[[], Batch]


def load_models(
    name: str,
    clip_name: str | None,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    max_batch: int = 8,
) -> Models:
    """Load the models; raises ModelError if one cannot be used."""
    # Schemas need a table of the vocabulary, built in seconds while the weights load.
    constrained = find_spec("llguidance") is not None
    model, processor = load_checkpoint(
        find_checkpoint(name, revision), dtype, constrained=constrained
    )
    clip = None if clip_name is None else load_clip(clip_name, dtype=dtype)
    prompt_cache, image_cache = PromptCache(), ImageCache()

    def new_batch() -> Batch:
        return BatchGenerator(
            model,
            processor,
            max_batch_size=max_batch,
            prompt_cache=prompt_cache,
            image_cache=image_cache,
        )

    return Models(model, processor, clip, new_batch)


def served_name(name: str) -> str:
    """Return the model name in requests: the repository id, or the last part of a local path."""
    return name if is_repository(name) else Path(name).name or name
