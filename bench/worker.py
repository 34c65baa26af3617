"""Process of one contender and one case, started by compare: `python -m bench.worker`.

Answers each line on stdin with a line of JSON on stdout. "run": {"seconds"}, the duration of the
work; short work is repeated for TURN_S and the median reported. "peak": {"bytes"}, peak memory
since loading ended: on a GPU as counted by MLX or PyTorch (PyTorch on a Mac only reports what it
holds at the end), else resident memory (since loading only on Linux, elsewhere since the start).
"work": {"flops", "tokens", "weights"}: operations of one repetition as PyTorch counts them, tokens
of the prompt, and bytes of weights; 0 where that does not apply.
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
# Modules of contenders, where the name differs.
MODULES = {
    "mlx-vlm": "mlx_vlm",
    "mlx-lm": "mlx_lm",
    "onnxruntime": "onnx_runtime",
    "openai-clip": "openai_clip",
    "llava-onevision": "llava_onevision",
}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # redirect the output of libraries to stderr

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
    weights = weight_bytes() if case.is_headline else 0
    reset_peak()
    on_gpu = case.gpu and not case.preprocesses
    answer(ready=True)
    repetitions = count()
    for request in sys.stdin:
        if request.strip() == "peak":
            answer(bytes=gpu_peak() if on_gpu else peak())
        elif request.strip() == "work":
            # LLaVA-OneVision has its own number of tokens for an image.
            count_tokens = getattr(contender, "prompt_tokens", lambda case: case.prompt_tokens)
            tokens = count_tokens(case) if case.work == "first" else 0
            answer(flops=flops(repeat), tokens=tokens, weights=weights)
        else:
            answer(seconds=median(turn(repeat, repetitions)))


def turn(repeat: Repeat, repetitions: Iterator[int]) -> list[float]:
    """Seconds of each repetition that starts within TURN_S, at least one."""
    deadline = time.perf_counter() + TURN_S
    seconds: list[float] = []
    while not seconds or time.perf_counter() < deadline:
        work = repeat(next(repetitions))
        synchronize()
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
        synchronize()
    return seconds


def synchronize() -> None:
    """Wait for pending work of MLX and collect garbage, outside the timing."""
    if "mlx.core" in sys.modules:
        sys.modules["mlx.core"].synchronize()
    gc.collect()


def flops(repeat: Repeat) -> int:
    """Operations of one repetition in PyTorch, a product and a sum as two; else 0."""
    if "torch" not in sys.modules:
        return 0
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    torch.backends.mha.set_fastpath_enabled(False)  # neither fused form of attention is counted
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        repeat(0)()
    return int(counter.get_total_flops())


def weight_bytes() -> int:
    """Bytes of the weights: of PyTorch's parameters, else of what MLX holds after loading."""
    torch = sys.modules.get("torch")
    if torch is None:
        return int(sys.modules["mlx.core"].get_active_memory())
    found = (x for x in gc.get_objects() if type(x) is torch.nn.Parameter)
    return sum(x.nbytes for x in found if x.device.type != "meta")


def reset_peak() -> None:
    """Reset the peak memory counters that can be reset."""
    gc.collect()
    if "mlx.core" in sys.modules:
        sys.modules["mlx.core"].reset_peak_memory()
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def gpu_peak() -> int:
    """Peak bytes held by MLX or PyTorch; a contender may import both, but computes with one."""
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
    """Peak resident memory in bytes."""
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


if __name__ == "__main__":
    main()
