"""Write sizes and outputs of this rank of mlx.launch to OUT/CHECKPOINT-RANK.npz.

Usage: rank_report.py OUT CHECKPOINT...
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from mlx_fastvlm import FastVLM, generate
from mlx_fastvlm.loader import find_checkpoint, load_checkpoint
from mlx_fastvlm.models.sharding import finish, join
from mlx_fastvlm.preprocess.processor import Processor
from mlx_mobileclip.checkpoints.weights import named_parameters

QUESTION, IMAGE = "How many circles are there?", "examples/scene.png"


def divided_bytes(model: FastVLM) -> int:
    """Bytes of the weights that are divided among ranks."""
    weights = named_parameters(model.language_model)
    return sum(weight.nbytes for name, weight in weights.items() if "_proj" in name)


def answers(model: FastVLM, processor: Processor) -> dict[str, Any]:
    """Logits at each position of a prompt, a greedy answer and a sampled one, both short."""
    inputs = processor(QUESTION, images=IMAGE)
    logits = model(inputs.input_ids[None], pixels=inputs.pixels)
    sampling: dict[str, Any] = {"temperature": 2.0, "top_p": 0.9, "max_tokens": 2}
    return {
        "logits": np.asarray(logits),
        "greedy": generate(model, processor, QUESTION, images=IMAGE, max_tokens=3).token_ids,
        "sampled": generate(model, processor, "Hello", **sampling).token_ids,
    }


def main(out: str, *checkpoints: str) -> None:
    group = join()
    assert group is not None
    for name in checkpoints:
        model, processor = load_checkpoint(find_checkpoint(name), "float32", group=group)
        values = answers(model, processor) | {"divided_bytes": divided_bytes(model)}
        np.savez(Path(out) / f"{Path(name).name}-{group.rank()}.npz", **values)
    finish(group)


if __name__ == "__main__":
    main(*sys.argv[1:])
