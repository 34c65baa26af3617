"""Check that canonical tensors account for every tensor of the source checkpoint.

Moved, split, transposed and renamed tensors must be equal bit by bit. Folded modules must compute
the same as with the source's tensors (`unfolded_modules.py`).
"""

import re
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from unfold_clip import unfold_mobileclip
from unfolded_modules import MODULES, NamedTensors, kernel

from convert.export.unfold import unfold
from mlx_fastvlm.checkpoints import fastvlm
from mlx_fastvlm.checkpoints.layouts import detect, fastvlm_source
from mlx_fastvlm.models.config import MODEL_TYPE, FastVLMConfig
from mlx_mobileclip.checkpoints import mobileclip
from mlx_mobileclip.checkpoints.hub import Checkpoint
from mlx_mobileclip.checkpoints.safetensors import read_tensors
from mlx_mobileclip.checkpoints.source import Tensors, without_prefixes
from mlx_mobileclip.checkpoints.weights import FLOATS
from mlx_mobileclip.errors import name_some
from mlx_mobileclip.json_fields import read_json
from mlx_mobileclip.models.clip import MobileCLIPConfig

TOWER = "vision_tower."
VOCABULARY = r"(^|\.)(embed_tokens|lm_head)\."  # rows may be cut off or added at the end
# Largest error of a folded module's output relative to its largest value: four times the rounding
# error of one weight. float16 rounds weights below 6e-5 more coarsely, to less than MIN_ERROR.
MAX_ERROR = {mx.float32: 2.0**-22, mx.float16: 2.0**-9, mx.bfloat16: 2.0**-6}
MIN_ERROR = {mx.float32: 0.0, mx.float16: 1e-5, mx.bfloat16: 0.0}


class UnaccountedError(AssertionError):
    """A source tensor does not correspond to the canonical tensors."""


class TensorReport(NamedTuple):
    """Numbers of source tensors by kind.

    Attributes:
        equal: Equal to canonical tensors, or to parts of them, bit by bit.
        folded: Folded into others that compute the same.
        dequantized: Of layers that are quantised in the source only.
        unused: Without effect: step counters, a classifier, a tied output layer.
    """

    equal: int
    folded: int
    dequantized: int
    unused: int


def report_fastvlm(
    checkpoint: Checkpoint,
    config: FastVLMConfig,
    tensors: Tensors,
    vision_from: Checkpoint | None = None,
) -> TensorReport:
    """Check the tensors of a FastVLM.

    Args:
        checkpoint: The source.
        config: The config read from it.
        tensors: The canonical tensors.
        vision_from: The source of the image tower, if it is another.

    Raises:
        UnaccountedError: naming a tensor of the source.
    """
    if vision_from is None:
        return _report_fastvlm(checkpoint, config, tensors)
    tower = {name: value for name, value in tensors.items() if name.startswith(TOWER)}
    rest = {name: value for name, value in tensors.items() if name not in tower}
    tower_report = _report_fastvlm(vision_from, config, tower, only_tower=True)
    rest_report = _report_fastvlm(checkpoint, config, rest)
    return TensorReport(*(a + b for a, b in zip(tower_report, rest_report, strict=True)))


def _report_fastvlm(
    checkpoint: Checkpoint, config: FastVLMConfig, tensors: Tensors, only_tower: bool = False
) -> TensorReport:
    original = without_prefixes(read_tensors(checkpoint.path), fastvlm.WRAPPERS)
    if read_json(checkpoint.path / "config.json").get("model_type") == MODEL_TYPE:
        prefix, source, unused = TOWER, NamedTensors(original), None
        unfolded = dict(tensors)
    else:
        layout = detect(original, checkpoint.name)
        arguments = (layout, config.vision, config.projector_type, checkpoint.name)
        key = fastvlm_source(original, *arguments).key
        prefix, source = layout.prefixes.get("vision", ""), NamedTensors(original, key, layout.nhwc)
        unfolded = unfold(config, tensors)
        tied = r"|(^|\.)lm_head\." if config.text.tie_word_embeddings else ""
        unused = fastvlm.NEVER_USED + tied
    if only_tower:
        for name in [name for name in original if not name.startswith(prefix)]:
            del original[name]
    return _compare(source, unfolded, unused)


def report_mobileclip(
    checkpoint: Checkpoint, config: MobileCLIPConfig, tensors: Tensors
) -> TensorReport:
    """Check the tensors of a MobileCLIP that is not canonical; see `report_fastvlm`."""
    original, layout = mobileclip.read_source(checkpoint)
    key = mobileclip.mobileclip_source(original, config, layout, checkpoint.name).key
    unfolded = unfold_mobileclip(config, tensors, layout.apple)
    return _compare(NamedTensors(original, key), unfolded, mobileclip.NEVER_USED)


def _compare(source: NamedTensors, unfolded: Tensors, unused: str | None) -> TensorReport:
    """Compare a source with unfolded tensors; takes all tensors of both."""
    ours = NamedTensors(unfolded)
    folded = _compare_folded(source, ours, {name: t.dtype for name, t in unfolded.items()})
    equal, dequantized = _compare_equal(source, ours)
    remaining = source.remaining()
    for key in remaining:
        if unused is None or not re.search(unused, key):
            raise UnaccountedError(f"{key} was not read")
    return TensorReport(equal, folded, dequantized, len(remaining))


def _compare_folded(source: NamedTensors, ours: NamedTensors, dtypes: dict[str, mx.Dtype]) -> int:
    """Run the folded modules of both; returns the number of the source's tensors in them."""
    folded = 0
    for name, dtype in dtypes.items():
        for pattern, run in MODULES:
            module = re.fullmatch(pattern, name)
            if not module or (run is kernel and source.has(name)):  # fused in the source already
                continue
            before = source.remaining()
            expected, value = run(source, module[1]), run(ours, module[1])
            used = sorted({*before} - {*source.remaining()})
            limit = MAX_ERROR[dtype] * np.abs(expected).max() + MIN_ERROR[dtype]
            if not np.abs(value - expected).max() <= limit:  # NaN as well
                raise UnaccountedError(f"{name_some(used, 3)} computes something else")
            folded += len(used)
    return folded


def _compare_equal(source: NamedTensors, ours: NamedTensors) -> tuple[int, int]:
    """Compare all other tensors; returns how many are equal, and how many were dequantised."""
    equal = dequantized = 0
    for name in ours.remaining():
        value = ours.take(name)
        if not source.has(name):
            if mx.any(value != 0).item():  # a bias of zeros need not be in the source
                raise UnaccountedError(f"{source.key(name)} is not in the source")
            continue
        original = source.take(name)
        if value.dtype in FLOATS and original.dtype not in FLOATS:
            path = name.removesuffix(".weight")
            parts = [f"{path}.{part}" for part in ("scales", "biases")]
            dequantized += 1 + len([source.take(part) for part in parts if source.has(part)])
            continue
        if re.search(VOCABULARY, name):
            rows = min(len(value), len(original))
            value, original = value[:rows], original[:rows]
        if value.size != original.size or not mx.array_equal(
            original.reshape(value.shape).astype(value.dtype), value
        ):
            raise UnaccountedError(f"{source.key(name)} differs")
        equal += 1
    return equal, dequantized
