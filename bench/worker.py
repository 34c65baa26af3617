"""One contender at one case, in a process of its own: `python -m bench.worker`, from compare.

Answers each line on stdin with a line of JSON on stdout: "run" with {"seconds"}, those of its
work, done over and over for TURN_S if it is brief, and then their median; "peak" with {"bytes"},
the most that was held since all was loaded: on a GPU by MLX or PyTorch (which on a Mac tells only
what it holds at the end), else resident in memory (but on Linux alone not since the start).
"""

import gc
import json
import os
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from itertools import count
from pathlib import Path
from statistics import median

from .cases import Case
from .contenders import Repeat

TURN_S = 1.0
MODULES = {"mlx-vlm": "mlx_vlm", "mlx-lm": "mlx_lm"}  # of contenders, where names differ


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print belongs to stderr

    def answer(**values: object) -> None:
        print(json.dumps(values), file=answers, flush=True)

    name, checkpoint = sys.argv[1], Path(sys.argv[3])
    case = Case(**json.loads(sys.argv[2]))
    try:
        contender = import_module(f"bench.contenders.{MODULES.get(name, name)}")
    except ModuleNotFoundError as error:
        answer(missing=error.name)
        return
    repeat = contender.prepare(case, checkpoint)
    forget_peak()
    on_gpu = case.gpu and not case.preprocesses
    answer(ready=True)
    repetitions = count()
    for order in sys.stdin:
        if order.strip() == "peak":
            answer(bytes=peak_on_gpu() if on_gpu else peak())
        else:
            answer(seconds=median(turn(repeat, repetitions)))


def turn(repeat: Repeat, repetitions: Iterator[int]) -> list[float]:
    """Seconds of each repetition that begins before TURN_S are over; of one at least."""
    over = time.perf_counter() + TURN_S
    seconds: list[float] = []
    while not seconds or time.perf_counter() < over:
        work = repeat(next(repetitions))
        settle()
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
        settle()
    return seconds


def settle() -> None:
    """Wait for what MLX was asked for in advance, and collect garbage, outside the timing."""
    if "mlx.core" in sys.modules:
        sys.modules["mlx.core"].synchronize()
    gc.collect()


def forget_peak() -> None:
    """Let peaks be counted anew, by those who can."""
    gc.collect()
    if "mlx.core" in sys.modules:
        sys.modules["mlx.core"].reset_peak_memory()
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_on_gpu() -> int:
    """Most bytes held by MLX or by PyTorch: a contender may import both, but computes with one."""
    peaks = [0]
    if "mlx.core" in sys.modules:
        peaks.append(sys.modules["mlx.core"].get_peak_memory())
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        peaks.append(torch.cuda.max_memory_allocated())
    elif torch and torch.backends.mps.is_available():
        peaks.append(torch.mps.driver_allocated_memory())
    return max(peaks)


def peak() -> int:
    """Most bytes resident."""
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


if __name__ == "__main__":
    main()
