"""Checkpoints to convert: the code that differs between FastVLM and MobileCLIP."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_fastvlm.loader import find_checkpoint
from mlx_fastvlm.loader import read_canonical as read_fastvlm
from mlx_fastvlm.loader import read_tokenizer as read_fastvlm_tokenizer
from mlx_fastvlm.models.config import FastVLMConfig
from mlx_fastvlm.models.fastvlm import PARTS as FASTVLM_PARTS
from mlx_fastvlm.models.fastvlm import FastVLM
from mlx_fastvlm.preprocess.processor import Processor as FastVLMProcessor
from mlx_mobileclip.checkpoints.core_ml.package import PARTS as PACKAGE_PARTS
from mlx_mobileclip.checkpoints.core_ml.package import SUFFIX as PACKAGE_SUFFIX
from mlx_mobileclip.checkpoints.hub import (
    DEMO,
    WEIGHT_SUFFIXES,
    Checkpoint,
    inspect_path,
    resolve_file,
)
from mlx_mobileclip.checkpoints.published_names import published_variant
from mlx_mobileclip.checkpoints.source import Tensors
from mlx_mobileclip.checkpoints.weights import check_fit
from mlx_mobileclip.errors import CheckpointError, ConfigError
from mlx_mobileclip.json_fields import read_json
from mlx_mobileclip.loader import read_canonical as read_mobileclip
from mlx_mobileclip.loader import read_own_merges
from mlx_mobileclip.loader import read_tokenizer as read_mobileclip_tokenizer
from mlx_mobileclip.models.clip import MODEL_TYPE as MOBILECLIP_TYPE
from mlx_mobileclip.models.clip import PARTS as MOBILECLIP_PARTS
from mlx_mobileclip.models.clip import MobileCLIP, MobileCLIPConfig
from mlx_mobileclip.preprocess.processor import Processor as MobileCLIPProcessor
from mlx_mobileclip.preprocess.tokenizer import write_merges

from .calibration import Sample
from .export import runtimes
from .options import ConvertOptions
from .quantize.quality import agreement, similarity
from .verify.stages import Read, StageOutput, Units, run_fastvlm, run_mobileclip


class FastVLMSource:
    """A FastVLM to convert, in any layout that the loader reads.

    Attributes:
        kind: Name of the architecture, a tag of the model card.
        parts: Tensor name prefix of each part that can be quantised.
        quality: Measures a quantised checkpoint against the source.
        checkpoint: Location of the source.
        files: Size and modification time of its files, before reading.
        default_parts: The parts that are quantised if the options name none.
        model: Built from the source's config, for names and shapes only; its parameters are never
            evaluated.
        description: Layout of the source, and for MobileCLIP its variant.
    """

    kind, parts, quality = "fastvlm", FASTVLM_PARTS, staticmethod(agreement)

    def __init__(self, checkpoint: Checkpoint, options: ConvertOptions):
        self.checkpoint, self.files = checkpoint, file_states(checkpoint.path)
        self.default_parts = tuple(self.parts) if options.max_size else ("decoder",)
        self._layout, self._vision_from = options.layout, options.vision_from
        self._config, tensors = self.read()
        if options.layout:
            runtimes.check_image_mode(options.layout, self._config.image_mode)
        self._tokenizer = read_fastvlm_tokenizer(checkpoint, self._config)
        self.model = FastVLM(self._config)
        check_fit(self.model, tensors, checkpoint.name)
        self.description = f"layout {self._config.source.get('layout', 'canonical')}"

    def read(self) -> tuple[FastVLMConfig, Tensors]:
        """Read config and lazy canonical tensors of the source, anew at each call."""
        return read_fastvlm(self.checkpoint, self._vision_from)

    @staticmethod
    def read_converted(directory: Path) -> tuple[FastVLMConfig, Tensors]:
        """Read config and lazy canonical tensors of the checkpoint that was written."""
        return read_fastvlm(Checkpoint(directory, str(directory)))

    def to_target_layout(
        self, config: FastVLMConfig, tensors: Tensors
    ) -> tuple[dict[str, Any], Tensors]:
        """Contents of config.json and lazy tensors in the layout of the options."""
        if self._layout:
            return runtimes.to_layout(config, tensors, self._layout, self._tokenizer)
        return config.to_json(), tensors

    def write_tokenizer(self, directory: Path) -> None:
        """Write tokenizer.json, and other files that the target runtime needs."""
        if self._layout:
            runtimes.write_tokenizer(directory, self._config, self._layout, self._tokenizer)
        else:
            self._tokenizer.save(directory / "tokenizer.json")

    def run_stages(self, read: Read, units: Units, samples: list[Sample]) -> Iterator[StageOutput]:
        """Run the checkpoint that `read` reads on samples, as `run_fastvlm`."""
        return run_fastvlm(read, units, samples, FastVLMProcessor(self._tokenizer, self._config))


class MobileCLIPSource:
    """A MobileCLIP to convert, with the attributes and methods of FastVLMSource."""

    kind, parts, quality = "mobileclip", MOBILECLIP_PARTS, staticmethod(similarity)
    default_parts = tuple(parts)

    def __init__(self, checkpoint: Checkpoint, options: ConvertOptions):
        self.checkpoint, self.files = checkpoint, file_states(checkpoint.path)
        self._overrides = options.variant, options.preprocess, options.config
        self._config, tensors = self.read()
        text = self._config.text
        self._merges = None if text is None else read_own_merges(checkpoint, text.vocab_size)
        self.model = MobileCLIP(self._config)
        check_fit(self.model, tensors, checkpoint.name)
        layout = self._config.source.get("layout", "canonical")
        self.description = f"{self._config.variant}, layout {layout}"

    def read(self) -> tuple[MobileCLIPConfig, Tensors]:
        """Read config and lazy canonical tensors of the source, anew at each call."""
        return read_mobileclip(self.checkpoint, *self._overrides)

    @staticmethod
    def read_converted(directory: Path) -> tuple[MobileCLIPConfig, Tensors]:
        """Read config and lazy canonical tensors of the checkpoint that was written."""
        return read_mobileclip(Checkpoint(directory, str(directory)))

    def to_target_layout(
        self, config: MobileCLIPConfig, tensors: Tensors
    ) -> tuple[dict[str, Any], Tensors]:
        """Contents of config.json and lazy tensors; the canonical layout is the only one."""
        return config.to_json(), tensors

    def write_tokenizer(self, directory: Path) -> None:
        """Write merges.txt, unless the tokenizer is CLIP's."""
        if self._merges is not None:
            write_merges(directory, self._merges)

    def run_stages(self, read: Read, units: Units, samples: list[Sample]) -> Iterator[StageOutput]:
        """Run the checkpoint that `read` reads on samples, as `run_mobileclip`."""
        tokenizer = read_mobileclip_tokenizer(self.checkpoint, self._config)
        processor = MobileCLIPProcessor(self._config.preprocess, tokenizer)
        return run_mobileclip(read, units, samples, processor)


ModelSource = FastVLMSource | MobileCLIPSource
PACKAGED_MOBILECLIPS = "apple/coreml-mobileclip"  # has several variants, so its name shows none


def file_states(source: Path) -> dict[str, tuple[int, int]]:
    """Size in bytes and modification time in ns of each file of a checkpoint."""
    paths = []
    for path in source.iterdir() if source.is_dir() else [source]:
        parts = PACKAGE_PARTS if path.suffix == PACKAGE_SUFFIX else ("",)
        paths += [path / part for part in parts if (path / part).exists()]
    states = ((path, path.stat()) for path in paths)
    return {str(path): (state.st_size, state.st_mtime_ns) for path, state in states}


def check_unchanged(source: ModelSource) -> None:
    """Check that the source did not change while it was read.

    Raises:
        CheckpointError: a file was changed or removed.
    """
    checkpoint, now = source.checkpoint, file_states(source.checkpoint.path)
    if changed := [name for name, state in source.files.items() if now.get(name) != state]:
        raise CheckpointError(
            f"{checkpoint.name}: {Path(changed[0]).name} was changed while it was read; convert "
            "again"
        )


def find_source(options: ConvertOptions) -> tuple[type[ModelSource], Checkpoint]:
    """Find the checkpoint, downloading it if necessary, and the class for its architecture.

    Raises:
        CheckpointError: there is no such checkpoint.
        ConfigError: an option is for the other architecture.
    """
    if _is_mobileclip(options):
        _reject("FastVLM", {"--vision-from": options.vision_from, "--layout": options.layout})
        return MobileCLIPSource, resolve_file(options.model, options.revision)
    _reject("MobileCLIP", {"--config": options.config, "--preprocess": options.preprocess})
    return FastVLMSource, find_checkpoint(options.model, options.revision)


def _reject(architecture: str, given: dict[str, object]) -> None:
    """Raise ConfigError for options of the other architecture."""
    for option, value in given.items():
        if value:
            raise ConfigError(f"{option} is for {architecture}; leave it out for this checkpoint")


def _is_mobileclip(options: ConvertOptions) -> bool:
    """Whether the name, file type or config.json is a MobileCLIP's."""
    name = os.fspath(options.model)
    if options.variant is not None or name == PACKAGED_MOBILECLIPS:
        return True
    if published_variant(name) is not None:
        return True
    if options.model == DEMO:
        return False
    path, is_directory, is_file = inspect_path(name)
    if is_file:
        return path.suffix in WEIGHT_SUFFIXES
    config = path / "config.json"
    if not is_directory:
        return False
    return not config.is_file() or read_json(config).get("model_type") in (None, MOBILECLIP_TYPE)
