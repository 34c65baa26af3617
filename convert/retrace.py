"""Find every tensor of a source again in what was made of it.

What was only moved, split, transposed or renamed must be there bit by bit. What was folded cannot
be had back, but must compute what the source's own tensors compute (`probe`).
"""

import re
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_fastvlm.config import MODEL_TYPE, FastVLMConfig
from mlx_mobileclip.checkpoint import FLOATS, read_json, read_tensors
from mlx_mobileclip.clip import MODEL_TYPE as MOBILECLIP_TYPE
from mlx_mobileclip.clip import MobileCLIPConfig
from mlx_mobileclip.errors import CheckpointError, name_some
from mlx_mobileclip.hub import Checkpoint

from . import fastvlm, mobileclip
from .layouts import detect, named_source
from .probe import MODULES, kernel
from .quantize import Tensors
from .source import Source, without_prefixes
from .unfold import unfold, unfold_mobileclip

TOWER = "vision_tower."
VOCABULARY = r"(^|\.)(embed_tokens|lm_head)\."  # may lose or gain rows at the end
# How far a folded module may be off, of the largest value that it makes: four times what rounding
# takes of one weight. Of weights below 6e-5 float16 takes more, which amounts to less than TINY.
MOST_ERROR = {mx.float32: 2.0**-22, mx.float16: 2.0**-9, mx.bfloat16: 2.0**-6}
TINY = {mx.float32: 0.0, mx.float16: 1e-5, mx.bfloat16: 0.0}


class Account(NamedTuple):
    """What became of the tensors of a source; how many are of each kind.

    Attributes:
        found: Are there, bit by bit.
        folded: Were computed with; what came of them computes the same.
        unpacked: Are of layers that only the source has packed.
        unused: Say nothing of the model: step counters, a classifier, a tied output layer.
    """

    found: int
    folded: int
    unpacked: int
    unused: int


def retrace_fastvlm(
    checkpoint: Checkpoint,
    config: FastVLMConfig,
    tensors: Tensors,
    tower_from: Checkpoint | None = None,
) -> Account:
    """Look for the tensors of a FastVLM's source.

    Args:
        checkpoint: The source.
        config: Of what was written.
        tensors: Its canonical tensors; emptied, so that memory is needed for a few at a time.
        tower_from: Where the image tower was taken from, if elsewhere.

    Raises:
        CheckpointError: naming a tensor that is not what was made of it.
    """
    if tower_from is None:
        return _retrace_fastvlm(checkpoint, config, tensors)
    tower = {name: tensors.pop(name) for name in list(tensors) if name.startswith(TOWER)}
    there = _retrace_fastvlm(tower_from, config, tower, only_tower=True)
    here = _retrace_fastvlm(checkpoint, config, tensors)
    return Account(*(a + b for a, b in zip(there, here, strict=True)))


def _retrace_fastvlm(
    checkpoint: Checkpoint, config: FastVLMConfig, tensors: Tensors, only_tower: bool = False
) -> Account:
    theirs = without_prefixes(read_tensors(checkpoint.path), fastvlm.WRAPPERS)
    if _is_canonical(checkpoint, MODEL_TYPE):
        source, prefix, unused = Source(theirs, str, checkpoint.name), TOWER, None
        unfolded = tensors
    else:
        layout = detect(theirs, checkpoint.name)
        vision, projector = config.vision, config.projector_type
        source = named_source(theirs, layout, vision, projector, checkpoint.name)
        unfolded, prefix = unfold(config, tensors), layout.vision
        tensors.clear()
        tied = r"|(^|\.)lm_head\." if config.text.tie_word_embeddings else ""
        unused = fastvlm.NEVER_USED + tied
    if only_tower:
        source.drop(f"^(?!{re.escape(prefix)})")
    return _account(source, unfolded, unused)


def retrace_mobileclip(
    checkpoint: Checkpoint, config: MobileCLIPConfig, tensors: Tensors
) -> Account:
    """Look for the tensors of a MobileCLIP's source; as `retrace_fastvlm`."""
    if _is_canonical(checkpoint, MOBILECLIP_TYPE):
        source = Source(read_tensors(checkpoint.path), str, checkpoint.name)
        return _account(source, tensors, None)
    theirs, layout = mobileclip.read_source(checkpoint)
    source = mobileclip.named_source(theirs, config, layout, checkpoint.name)
    ours = unfold_mobileclip(config, tensors, layout.apple)
    return _account(source, ours, mobileclip.NEVER_USED)


def _is_canonical(checkpoint: Checkpoint, model_type: str) -> bool:
    path = checkpoint.path / "config.json"
    return path.is_file() and read_json(path).get("model_type") == model_type


def _account(source: Source, tensors: Tensors, unused: str | None) -> Account:
    """Compare with the source what was unfolded; empties both."""
    ours = Source(tensors, str, "what was written")
    folded = _compare_folded(source, ours, {name: t.dtype for name, t in tensors.items()})
    found, unpacked = _compare_moved(source, ours)
    left = source.left()
    for key in left:
        if unused is None or not re.search(unused, key):
            raise CheckpointError(f"{source.where}: nothing was made of {key}; please report this")
    return Account(found, folded, unpacked, len(left))


def _mistake(where: str, key: str) -> CheckpointError:
    return CheckpointError(f"{where}: {key} is not what was made of it; please report this")


def _compare_folded(source: Source, ours: Source, dtypes: dict[str, mx.Dtype]) -> int:
    """Run what was folded, on both sides; takes their tensors, and counts the source's."""
    folded = 0
    for name, dtype in dtypes.items():
        for pattern, run in MODULES:
            module = re.fullmatch(pattern, name)
            if not module or (run is kernel and source.has(name)):  # was one kernel before
                continue
            before = source.left()
            expected, value = run(source, module[1]), run(ours, module[1])
            taken = sorted({*before} - {*source.left()})
            most = MOST_ERROR[dtype] * np.abs(expected).max() + TINY[dtype]
            if not np.abs(value - expected).max() <= most:  # NaN as well
                raise _mistake(source.where, name_some(taken, 3))
            folded += len(taken)
    return folded


def _compare_moved(source: Source, ours: Source) -> tuple[int, int]:
    """Compare what is left, bit by bit; how many were found, and how many only unpacked."""
    found = unpacked = 0
    for name in ours.left():
        mine = ours.find(name)
        if not source.has(name):
            if mx.any(mine != 0).item():  # only what adds nothing may come of nothing
                raise _mistake(source.where, source.key(name))
            continue
        original = source.find(name)
        if mine.dtype in FLOATS and original.dtype not in FLOATS:
            path = name.removesuffix(".weight")
            parts = [f"{path}.{part}" for part in ("scales", "biases")]
            unpacked += 1 + len([source.find(part) for part in parts if source.has(part)])
            continue
        if re.search(VOCABULARY, name):
            rows = min(len(mine), len(original))
            mine, original = mine[:rows], original[:rows]
        if mine.size != original.size or not mx.array_equal(
            original.reshape(mine.shape).astype(mine.dtype), mine
        ):
            raise _mistake(source.where, source.key(name))
        found += 1
    return found, unpacked
