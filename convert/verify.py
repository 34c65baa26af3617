"""Look again at what was written: every tensor, and every stage of a pass through the model."""

from collections.abc import Iterable
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_mobileclip.checkpoint import read_tensors
from mlx_mobileclip.errors import CheckpointError

from .calibration import Sample
from .quantize import Tensors
from .retrace import Account
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


def as_before(written: Tensors, original: Tensors, repacked: Iterable[str]) -> Tensors:
    """Written tensors, but the original ones of layers that were packed or unpacked on the way.

    `compare` has shown that the written are what packing or unpacking makes of these. Empties
    both.
    """
    paths, out = {*repacked}, Tensors()
    for tensors, wanted in ((written, False), (original, True)):
        for name in list(tensors):
            tensor = tensors.pop(name)
            if (name.rpartition(".")[0] in paths) == wanted:
                out[name] = tensor
    return out


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


def report(account: Account, errors: dict[str, float], repacked: int) -> str:
    """Markdown: what became of the source's tensors, and each stage's error."""
    counts = (
        (account.found, "found again, bit by bit"),
        (account.folded, "folded into others, which compute the same"),
        (account.unpacked, "unpacked, as what they were fused with was packed otherwise"),
        (account.unused, "not used"),
    )
    parts = "; ".join(f"{count} {what}" for count, what in counts if count)
    text = f"{sum(account)} tensors of the source: {parts}."
    if repacked:
        text += f" {repacked} layers were looked at before they were packed or unpacked."
    rows = "\n".join(f"| {stage} | {error:.1e} |" for stage, error in errors.items())
    return f"{text}\n\n| against the source, on a test image | relative error |\n|---|---|\n{rows}"
