"""Compare the written tensors with the expected ones, and stage outputs with the source's."""

from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_mobileclip.checkpoints.safetensors import read_tensors
from mlx_mobileclip.checkpoints.source import Tensors
from mlx_mobileclip.errors import CheckpointError

from ..calibration import Sample
from .stages import Read, RunStages

# Largest relative error of a stage's output. Rounding the weights to the dtype causes a tenth of
# this; a misplaced layer causes about 1.
MAX_ERROR = {mx.float32: 1e-3, mx.float16: 3e-2, mx.bfloat16: 1e-1}


def check_written(directory: Path, tensors: Tensors) -> int:
    """Read the tensors back and compare them bit by bit.

    Args:
        directory: The checkpoint that was written.
        tensors: Expected tensors; emptied, so that only one at a time is in memory.

    Returns:
        The number of tensors.

    Raises:
        CheckpointError: a tensor differs, is missing or is unexpected.
    """
    written, count = read_tensors(directory), len(tensors)
    for name in list(tensors):
        same = name in written and mx.array_equal(written.pop(name), tensors.pop(name)).item()
        if not same:
            raise CheckpointError(
                f"{directory}: {name} was not written correctly; try another disk"
            )
    if written:
        raise CheckpointError(f"{directory}: {next(iter(written))} was written but not expected")
    return count


def stage_errors(
    run_stages: RunStages, original: Read, converted: Read, sample: Sample
) -> dict[str, float]:
    """Relative error of each stage's output on one sample, by stage: norm(a - b) / norm(a).

    Args:
        run_stages: Runs a model of this architecture.
        original: Reads the source.
        converted: Reads the written checkpoint.
        sample: Input of both.
    """
    errors: dict[str, float] = {}
    outputs = (run_stages(read, {}, [sample]) for read in (original, converted))
    for expected, actual in zip(*outputs, strict=True):
        value, other = (output.value.astype(mx.float32) for output in (expected, actual))
        error = mx.linalg.norm(value - other) / mx.linalg.norm(value)
        errors[expected.stage] = float(np.array(error))
    return errors


def check_errors(errors: dict[str, float], dtype: mx.Dtype, quantized: bool, where: Path) -> None:
    """Check that the errors of the stages are within the bounds of rounding the weights.

    Args:
        errors: From `stage_errors`.
        dtype: dtype of the written weights.
        quantized: Whether layers are quantised. Then any finite error is accepted.
        where: The checkpoint, for the message.

    Raises:
        CheckpointError: the error of a stage is too large.
    """
    limit = float("inf") if quantized else MAX_ERROR[dtype]
    for stage, error in errors.items():
        if not error < limit:  # NaN as well
            raise CheckpointError(
                f"{where}: {stage} is off by {error:.2g} of its norm, but {dtype} explains at "
                f"most {limit:g}; convert with another --dtype, or report this checkpoint"
            )


def verify_report(count: int, errors: dict[str, float]) -> str:
    """The result of `--verify` as Markdown: tensors read back, and the error of each stage."""
    rows = "\n".join(f"| {stage} | {error:.1e} |" for stage, error in errors.items())
    return (
        f"{count} tensors were read back and are identical bit by bit.\n\n"
        f"| against the source, on a test image | relative error |\n|---|---|\n{rows}"
    )
