"""transformers' FastVLM in PyTorch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracle  # first, because it makes torchvision importable
import torch
from PIL import ImageOps
from safetensors.numpy import load_file
from transformers import CLIPImageProcessor

from .. import inputs
from ..cases import DECODE_PROMPT, STRIDE, Case
from . import Repeat, Work
from .pytorch import set_up, synchronized

EMBEDDING = "model.embed_tokens.weight"


def prepare(case: Case, checkpoint: Path) -> Repeat:
    device, dtype = set_up(case)
    if case.preprocesses:
        return _preprocess(case)
    return synchronized(_fastvlm(case, checkpoint, device, dtype), device)


def _preprocess(case: Case) -> Repeat:
    side = {"height": case.resolution, "width": case.resolution}
    black, white = [0.0] * 3, [1.0] * 3
    processor = CLIPImageProcessor(
        size={"shortest_edge": case.resolution}, crop_size=side, image_mean=black, image_std=white
    )
    open_photo = inputs.camera(decoded=case.work == "preprocess")

    def work() -> object:
        image = open_photo().convert("RGB")
        square = ImageOps.pad(image, (max(image.size),) * 2)  # black, as in Apple's pipeline
        return processor(square, return_tensors="pt")["pixel_values"]

    return lambda _: work


def _fastvlm(case: Case, checkpoint: Path, device: torch.device, dtype: torch.dtype) -> Repeat:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["lm_head.weight"] = tensors[EMBEDDING]
    model = oracle.fast_vlm(tensors, case.size).to(device, dtype)
    side, image_id = case.resolution, model.config.image_token_index

    def model_inputs(repetition: int, tokens: int, images: int) -> dict[str, Any]:
        placeholders = [image_id] * (images * (side // STRIDE) ** 2)
        ids = np.concatenate([placeholders, inputs.text_ids(repetition, tokens)])
        arguments: dict[str, Any] = {
            "input_ids": torch.from_numpy(ids.astype(np.int64))[None].to(device)
        }
        if images:
            values = inputs.pixels(repetition, (images, 3, side, side))
            arguments["pixel_values"] = torch.from_numpy(values).to(device, dtype)
        return arguments

    def vision(repetition: int) -> Work:
        values = torch.from_numpy(inputs.pixels(repetition, (1, 3, side, side))).to(device, dtype)
        return lambda: model.model.get_image_features(values).pooler_output

    def first(repetition: int) -> Work:
        arguments = model_inputs(repetition, case.tokens, case.images)
        return lambda: model(**arguments, logits_to_keep=1).logits.argmax()

    def decode(repetition: int) -> Work:
        out = model(**model_inputs(repetition, DECODE_PROMPT, 0), use_cache=True, logits_to_keep=1)

        def work() -> None:
            token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            for _ in range(case.tokens):
                step = model(input_ids=token, past_key_values=cache, use_cache=True)
                token = step.logits[:, -1:].argmax(-1)

        return work

    works: dict[str, Callable[[int], Work]] = {
        "vision": vision,
        "first": first,
        "second": first,
        "decode": decode,
    }
    return works[case.work]
