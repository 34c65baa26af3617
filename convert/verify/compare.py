"""Compare what was written with what should have been written, and its stages with the source's."""

from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_mobileclip.checkpoints.safetensors import read_tensors
from mlx_mobileclip.checkpoints.source import Tensors
from mlx_mobileclip.errors import CheckpointError

from ..calibration import Sample
from .stages import Read, RunStages

# Largest relative error of a stage's output. Rounding the weights to the dtype causes a tenth of
# it; a layer in the wrong place causes about 1.
MAX_ERROR = {mx.float32: 1e-3, mx.float16: 3e-2, mx.bfloat16: 1e-1}


def check_written(directory: Path, tensors: Tensors) -> int:
    """Read the tensors back and compare them bit by bit.

    Args:
        directory: The checkpoint that was written.
        tensors: What it should hold; emptied, so that memory is needed for one at a time.

    Returns:
        The number of tensors.

    Raises:
        CheckpointError: a tensor differs, is missing or should not be there.
    """
    written, count = read_tensors(directory), len(tensors)
    for name in list(tensors):
        same = name in written and mx.array_equal(written.pop(name), tensors.pop(name)).item()
        if not same:
            raise CheckpointError(f"{directory}: {name} was not written as it is; try another disk")
    if written:
        raise CheckpointError(f"{directory}: {next(iter(written))} was written out of nothing")
    return count


def stage_errors(
    run_stages: RunStages, original: Read, converted: Read, sample: Sample
) -> dict[str, float]:
    """Relative error of each stage's output on one sample, by stage: norm(a - b) / norm(a).

    Args:
        run_stages: Runs a model of this architecture.
        original: Reads the source.
        converted: Reads what was written.
        sample: The input of both.
    """
    errors: dict[str, float] = {}
    outputs = (run_stages(read, {}, [sample]) for read in (original, converted))
    for expected, found in zip(*outputs, strict=True):
        value, other = (output.value.astype(mx.float32) for output in (expected, found))
        error = mx.linalg.norm(value - other) / mx.linalg.norm(value)
        errors[expected.stage] = float(np.array(error))
    return errors


def check_errors(errors: dict[str, float], dtype: mx.Dtype, quantized: bool, where: Path) -> None:
    """Compare the errors of the stages with what rounding the weights to a dtype causes.

    Args:
        errors: As of `stage_errors`.
        dtype: Of the weights that were written.
        quantized: Whether layers are quantised. Their errors may be of any finite size.
        where: The checkpoint, for the message.

    Raises:
        CheckpointError: the error of a stage is larger.
    """
    limit = float("inf") if quantized else MAX_ERROR[dtype]
    for stage, error in errors.items():
        if not error < limit:  # NaN as well
            raise CheckpointError(
                f"{where}: {stage} is off by {error:.2g} of its size where {dtype} explains "
                f"{limit:g}; convert with another --dtype, or report this checkpoint"
            )


def verify_report(count: int, errors: dict[str, float]) -> str:
    """The result of `--verify` as Markdown: tensors read back, and the error of each stage."""
    rows = "\n".join(f"| {stage} | {error:.1e} |" for stage, error in errors.items())
    return (
        f"{count} tensors were read back, bit by bit as they were written.\n\n"
        f"| against the source, on a test image | relative error |\n|---|---|\n{rows}"
    )
