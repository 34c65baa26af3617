"""mlx-vlm's FastVLM."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import synthetic

from .. import inputs, models
from ..cases import Case
from . import Repeat, Work

IMAGE_ID = -200


def prepare(case: Case, checkpoint: Path) -> Repeat:
    models.import_mlx_vlm()
    return _preprocess(case) if case.preprocesses else _fastvlm(case, checkpoint)


def _preprocess(case: Case) -> Repeat:
    from mlx_vlm.models.fastvlm.processing import FastVLMImageProcessor

    processor: Any = FastVLMImageProcessor()
    open_photo = inputs.camera(decoded=case.work == "preprocess")

    def work() -> None:
        mx.eval(mx.array(processor.preprocess([open_photo()])["pixel_values"]))

    return lambda _: work


def _fastvlm(case: Case, checkpoint: Path) -> Repeat:
    from mlx_vlm.generate.ar import generate_step

    model = models.mlx_vlm(case.size)
    dtype = getattr(mx, case.dtype)
    weights = {}
    loaded: Any = mx.load(str(checkpoint / "model.safetensors"))
    for key, value in loaded.items():
        if value.ndim == 4:
            value = value.transpose(0, 2, 3, 1)
            value = value.reshape(-1).reshape(value.shape)  # contiguous, as read from a file
        elif "layer_scale" in key:
            value = value.reshape(1, 1, -1)
        weights[str(synthetic.mlx_vlm_name(key))] = value.astype(dtype)
    model.load_weights(list(weights.items()), strict=True)
    mx.eval(model.parameters())
    side = case.resolution

    def vision(repetition: int) -> Work:
        pixels = mx.array(inputs.pixels(repetition, (1, side, side, 3))).astype(dtype)
        mx.eval(pixels)  # already on the GPU, like PyTorch's

        def work() -> None:
            _, x, _ = model.vision_tower(pixels)
            mx.eval(model.mm_projector(x.reshape(1, -1, x.shape[-1])))

        return work

    def first(repetition: int) -> Work:
        pixels = None
        if case.images:
            pixels = mx.array(inputs.pixels(repetition, (case.images, 3, side, side)))
            pixels = pixels.astype(dtype)
        question = inputs.text_ids(repetition, case.tokens)
        ids = mx.array(np.concatenate([[IMAGE_ID] * case.images, question]).astype(np.int32))[None]
        steps = generate_step(ids, model, pixels, mx.ones_like(ids), max_tokens=1, temperature=0.0)
        return lambda: next(steps)

    works: dict[str, Callable[[int], Work]] = {"vision": vision, "first": first, "second": first}
    return works[case.work]
