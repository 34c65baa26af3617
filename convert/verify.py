"""Look again at what was written: every tensor, and every stage of a pass through the model."""

from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_fastvlm.config import FastVLMConfig
from mlx_mobileclip.checkpoint import as_dtype, read_tensors
from mlx_mobileclip.errors import CheckpointError
from mlx_mobileclip.hub import Checkpoint

from .calibration import Sample
from .fastvlm import WRAPPERS
from .layouts import detect, names
from .quantize import Tensors
from .source import without_prefixes
from .unfold import split_decoder
from .walk import Read, Walk

# Of what a stage makes, relative. Rounding weights to the dtype that is written gives a tenth of
# it; a layer in the wrong place gives about 1. Packing may cost anything, and is measured apart.
MOST_ERROR = {mx.float32: 1e-3, mx.float16: 3e-2, mx.bfloat16: 1e-1}


def compare(directory: Path, tensors: Tensors) -> None:
    """Read back what was written; empties `tensors`.

    Raises:
        CheckpointError: it is not, bit by bit, what these tensors say.
    """
    written = read_tensors(directory)
    for name in list(tensors):
        same = name in written and mx.array_equal(written.pop(name), tensors.pop(name)).item()
        if not same:
            raise CheckpointError(f"{directory}: {name} was not written as it is; try another disk")
    if written:
        raise CheckpointError(f"{directory}: {next(iter(written))} was written out of nothing")


def compare_with_source(source: Checkpoint, config: FastVLMConfig, written: Tensors) -> int:
    """Map the decoder and projector back to the names of their source, and compare bit by bit.

    Args:
        source: In any layout but the canonical.
        config: Of what was written.
        written: Its canonical tensors.

    Returns:
        How many of the source's tensors were found again. Those of the tower were folded, and
        layers that were packed differ: for these the stages' errors tell.

    Raises:
        CheckpointError: one is not the same.
    """
    theirs = without_prefixes(read_tensors(source.path), WRAPPERS)
    layout = detect(theirs, source.name)
    name = names(layout, config.vision, config.projector_type)
    ours = {key: value for key, value in written.items() if key.startswith("projector.")}
    ours |= split_decoder(config.text, written)
    found = 0
    for common, tensor in ours.items():
        original = theirs.get(name(common))
        if original is None or original.shape[1:] != tensor.shape[1:]:
            continue  # packed in only one of the two
        rows = original[: len(tensor)]  # without those that fill a vocabulary up
        if not mx.array_equal(as_dtype(rows, tensor.dtype), tensor).item():
            raise CheckpointError(
                f"{source.name}: {name(common)} is not what was made of it; please report this"
            )
        found += 1
    return found


def stage_errors(walk: Walk, original: Read, written: Read, sample: Sample) -> dict[str, float]:
    """Relative error, by stage, of what was written against its source, on one picture."""
    errors: dict[str, float] = {}
    theirs, ours = (walk(read, {}, [sample]) for read in (original, written))
    for expected, found in zip(theirs, ours, strict=True):
        value, other = (each.value.astype(mx.float32) for each in (expected, found))
        error = mx.linalg.norm(value - other) / mx.linalg.norm(value)
        errors[expected.stage] = float(np.array(error))
    return errors


def check_errors(errors: dict[str, float], dtype: mx.Dtype, packed: bool, where: Path) -> None:
    """Raises CheckpointError if a stage is farther off than storing in this dtype explains."""
    most = float("inf") if packed else MOST_ERROR[dtype]
    for stage, error in errors.items():
        if not error < most:  # NaN as well
            raise CheckpointError(
                f"{where}: {stage} is off by {error:.2g} of its size where {dtype} explains "
                f"{most:g}; convert with another --dtype, or report this checkpoint"
            )


def error_table(errors: dict[str, float], found: int) -> str:
    """Markdown, with how many tensors `compare_with_source` has found again."""
    same = f"{found} tensors of the source found again, bit by bit.\n\n" if found else ""
    rows = "\n".join(f"| {stage} | {error:.1e} |" for stage, error in errors.items())
    return f"{same}| against the source, on a test image | relative error |\n|---|---|\n{rows}"
