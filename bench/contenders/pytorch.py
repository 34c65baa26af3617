"""PyTorch setup of its contenders: no gradients, all cores or the GPU."""

import os

import oracle  # noqa: F401 (makes torchvision importable)
import torch

from ..cases import Case
from . import Repeat, Work


def set_up(case: Case) -> tuple[torch.device, torch.dtype]:
    """Configure PyTorch; returns device and dtype of the case."""
    torch.set_num_threads(os.cpu_count() or 1)
    torch.set_grad_enabled(False)
    name = ("cuda" if torch.cuda.is_available() else "mps") if case.gpu else "cpu"
    return torch.device(name), getattr(torch, case.dtype)


def synchronized(repeat: Repeat, device: torch.device) -> Repeat:
    """Return a function that runs the work and then waits until the GPU has finished."""
    if device.type == "cpu":
        return repeat
    wait = torch.cuda.synchronize if device.type == "cuda" else torch.mps.synchronize

    def prepare(repetition: int) -> Work:
        work = repeat(repetition)
        wait()

        def run() -> None:
            work()
            wait()

        return run

    return prepare
