"""Run the comparisons of `check` and report their results."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from typing import Any

import mlx.core as mx

from ..checkpoints.hub import Checkpoint
from ..device import dtype_name
from ..errors import name_some
from ..terminal import Bar
from .bounds import Bounds, bounds
from .compare import Models, Row, Step
from .forms import FORMS, GPU_FORMS, compare_form
from .machine import Finding, Machine, findings, this_machine

CACHE_BYTES = 1 << 28  # freed memory that MLX may keep
MAX_NAMED = 4  # names of failures in the verdict


@dataclass(frozen=True, slots=True)
class Report:
    """Result of a check.

    Attributes:
        model: Name of the model.
        revision: Its commit, if it is from a repository.
        dtype: dtype on the device.
        machine: The machine and its software.
        findings: Known problems of the machine.
        rows: The comparisons.
        seconds: Time of the comparisons.
        peak_memory_bytes: Peak memory of MLX.
    """

    model: str
    revision: str | None
    dtype: str
    machine: Machine
    findings: list[Finding]
    rows: list[Row]
    seconds: float
    peak_memory_bytes: int

    @property
    def wrong(self) -> list[str]:
        """Names of the findings and comparisons that are wrong."""
        known = [finding.text.partition(":")[0] for finding in self.findings if finding.wrong]
        return known + [row.name for row in self.rows if not row.right]

    @property
    def verdict(self) -> str:
        """The result in one line."""
        if self.wrong:
            return f"WRONG: {name_some(self.wrong, MAX_NAMED)}"
        return f"All right: {len(self.rows)} comparisons in {self.dtype} on {self.machine.device}"

    def lines(self) -> Iterator[str]:
        """The report as text, at most 80 columns wide unless a message is longer."""
        machine = self.machine
        system = f"macOS {machine.macos}" if machine.macos else machine.system.partition("-")[0]
        yield f"{self.model} in {self.dtype} on {machine.device} ({machine.backend})"
        yield f"mlx {machine.mlx}, Python {machine.python}, {system}, {self._memory()}"
        yield ""
        yield f"{'':41}{'error':>9}{'bound':>9}{'chain':>9}"
        for _, group in groupby(self.rows, lambda row: row.stage):
            yield from map(_line, _shown(list(group)))
        yield ""
        for finding in self.findings:
            yield f"{'WRONG' if finding.wrong else 'note'}: {finding.text}"
        for row in self.rows:
            if row.failure:
                yield f"WRONG: {row.name}: {row.failure}"
        yield self.verdict

    def to_json(self) -> dict[str, Any]:
        """The whole report, for bug reports."""
        return {
            "model": self.model,
            "revision": self.revision,
            "dtype": self.dtype,
            "machine": asdict(self.machine),
            "findings": [finding._asdict() for finding in self.findings],
            "comparisons": [_as_json(row) for row in self.rows],
            "verdict": self.verdict,
            "right": not self.wrong,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
        }

    def _memory(self) -> str:
        free = self.machine.free_bytes
        text = f"{self.machine.memory_bytes / 1e9:.1f} GB"
        return text if free is None else f"{text}, {free / 1e9:.1f} free"


def run_check(
    checkpoint: Checkpoint,
    models: Models,
    list_steps: Callable[[Bounds], list[Step]],
    *,
    quiet: bool,
) -> Report:
    """Compare a model with its reference and FORMS with their definitions, with a progress bar.

    Args:
        checkpoint: The model's checkpoint.
        models: The model on the device, and its reference.
        list_steps: Returns the comparisons of the model, given the bounds.
        quiet: Show no progress.
    """
    machine = this_machine()
    limits = bounds(models.dtype, machine)
    forms = FORMS if machine.backend == "cpu" else (*FORMS, *GPU_FORMS)
    steps: list[Step] = [
        *list_steps(limits),
        *(partial(compare_form, form, models.dtype, limits.part) for form in forms),
    ]
    cache_limit = mx.set_cache_limit(CACHE_BYTES)
    mx.reset_peak_memory()
    started, rows = time.perf_counter(), list[Row]()
    try:
        with Bar(len(steps), "steps", quiet=quiet) as bar:
            for step in steps:
                rows += step()
                bar.advance(1)
    finally:
        mx.set_cache_limit(cache_limit)
    return Report(
        model=checkpoint.name,
        revision=checkpoint.revision,
        dtype=dtype_name(models.dtype),
        machine=machine,
        findings=findings(machine, models.dtype, models.weight_bytes),
        rows=rows,
        seconds=time.perf_counter() - started,
        peak_memory_bytes=mx.get_peak_memory(),
    )


def _shown(rows: list[Row]) -> list[Row]:
    """Rows of a stage to show: those that are wrong, else the one with the largest error."""
    wrong = [row for row in rows if not row.right]
    return wrong or [max(rows, key=lambda row: row.error / row.bound)]


def _line(row: Row) -> str:
    chain = "" if row.chain_error is None else f"{row.chain_error:.1e}"
    verdict = "ok" if row.right else "WRONG"
    return f"{row.name:41.41}{row.error:9.1e}{row.bound:9.1e}{chain:>9}  {verdict}"


def _as_json(row: Row) -> dict[str, Any]:
    """Fields of a row; infinity and NaN, which JSON lacks, become null."""
    values = asdict(row) | {"right": row.right}
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
