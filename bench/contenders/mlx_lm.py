"""mlx-lm's Qwen2 and its generation loop."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import synthetic
from mlx_lm.generate import generate_step
from mlx_lm.models import qwen2

from .. import inputs
from ..cases import DECODE_PROMPT, Case
from . import Repeat, Work

DECODER = ("model.embed_tokens.", "model.layers.", "model.norm.")


def prepare(case: Case, checkpoint: Path) -> Repeat:
    config = synthetic.apple_config(case.size, case.resolution)
    model = qwen2.Model(qwen2.ModelArgs.from_dict(config | {"model_type": "qwen2"}))
    model.eval()
    dtype = getattr(mx, case.dtype)
    loaded: Any = mx.load(str(checkpoint / "model.safetensors"))
    weights = {k: v.astype(dtype) for k, v in loaded.items() if k.startswith(DECODER)}
    model.load_weights(list(weights.items()), strict=True)
    mx.eval(model.parameters())

    def decode(repetition: int) -> Work:
        prompt = mx.array(inputs.text_ids(repetition, DECODE_PROMPT))
        steps = generate_step(prompt, model, max_tokens=case.tokens + 1)
        next(steps)
        return lambda: list(steps)

    return decode
