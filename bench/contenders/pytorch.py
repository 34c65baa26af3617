"""PyTorch as its contenders use it: without gradients, on all cores or on the GPU."""

import os

import oracle  # noqa: F401 (makes torchvision importable)
import torch

from ..cases import Case
from . import Repeat, Work


def set_up(case: Case) -> tuple[torch.device, torch.dtype]:
    """Where to compute the case, and in what."""
    torch.set_num_threads(os.cpu_count() or 1)
    torch.set_grad_enabled(False)
    name = ("cuda" if torch.cuda.is_available() else "mps") if case.gpu else "cpu"
    return torch.device(name), getattr(torch, case.dtype)


def to_the_end(repeat: Repeat, device: torch.device) -> Repeat:
    """The same with work that ends when the GPU has done it."""
    if device.type == "cpu":
        return repeat
    wait = torch.cuda.synchronize if device.type == "cuda" else torch.mps.synchronize

    def waiting(repetition: int) -> Work:
        work = repeat(repetition)
        wait()

        def run() -> None:
            work()
            wait()

        return run

    return waiting
