"""The training loop of both demo models: resumable, logged, reproducible."""

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from reference import torch
from torch import Tensor, nn

SAVE_SECONDS = 120
LOG_STEPS = 50
MUON_RATE = 2e-3


def train(
    name: str,
    model: nn.Module,
    groups: list[dict[str, Any]],
    batches: Callable[[int], Iterator[Any]],
    step: Callable[[Any], tuple[Tensor, dict[str, float]]],
    steps: int,
    out: Path,
    matrices: Sequence[nn.Parameter] = (),
    muon_rate: float = MUON_RATE,
) -> None:
    """Run one phase of training, or resume it after an interruption.

    Args:
        name: Name of the phase, and of its state and log files in `out`.
        model: Trained in place.
        groups: Parameter groups with their peak `lr`: linear warm-up for 3 % of the steps, then
            cosine decay to zero.
        batches: Returns endless batches, given the number of batches already used.
        step: Returns the loss of a batch, and figures to log.
        steps: Total number of optimizer steps.
        out: Directory for state and log.
        matrices: 2-D parameters that Muon updates instead of AdamW.
        muon_rate: Their peak learning rate.
    """
    optimizers = [torch.optim.AdamW(groups, weight_decay=0.03, betas=(0.9, 0.98), fused=True)]
    if matrices:
        optimizers.append(
            torch.optim.Muon(matrices, muon_rate, weight_decay=0.03, adjust_lr_fn="match_rms_adamw")
        )
    warmup = max(1, int(0.03 * steps))
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    state_path, log_path = out / f"{name}.pt", out / f"{name}.jsonl"
    done, seconds = 0, 0.0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        done, seconds = state["done"], state["seconds"]
        if done < steps:
            for optimizer, saved_state in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved_state)
    source = batches(done) if done < steps else iter(())
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    started = saved = time.monotonic()
    parameters = [p for group in groups for p in group["params"]] + list(matrices)
    for i in range(done, steps):
        share = min((i + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * i / steps))
        loss, figures = step(next(source))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, rates in zip(optimizers, peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = share * peak
            optimizer.step()
            optimizer.zero_grad()
        for key, value in figures.items():
            sums[key] += value
            counts[key] += 1
        last = i + 1 == steps
        now = time.monotonic()
        if (i + 1) % LOG_STEPS == 0 or last:
            record = {"step": i + 1, "seconds": round(seconds + now - started, 1)}
            record |= {key: round(sums[key] / counts[key], 4) for key in sums}
            print(name, record, flush=True)
            with log_path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            sums.clear()
            counts.clear()
        if last or now - saved > SAVE_SECONDS:
            state = {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "done": i + 1,
                "seconds": seconds + now - started,
            }
            partial = state_path.with_suffix(".partial")
            torch.save(state, partial)
            partial.replace(state_path)
            saved = now
