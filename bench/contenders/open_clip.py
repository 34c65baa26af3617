"""open_clip's MobileCLIP: PyTorch on all cores, without gradients, branches fused."""

import os
from pathlib import Path
from typing import Any

import oracle  # noqa: F401 (makes torchvision importable)
import torch
from safetensors.numpy import load_file

from .. import inputs
from ..cases import Case
from . import Repeat

import open_clip  # isort: skip (after oracle)
from timm.utils.model import reparameterize_model  # isort: skip


def prepare(case: Case, checkpoint: Path) -> Repeat:
    torch.set_num_threads(os.cpu_count() or 1)
    torch.set_grad_enabled(False)
    model: Any = open_clip.create_model(checkpoint.stem)
    state = {key: torch.from_numpy(value) for key, value in load_file(checkpoint).items()}
    model.load_state_dict(state, strict=True)
    model = reparameterize_model(model.eval())
    side = model.visual.image_size
    side = side[0] if isinstance(side, tuple) else side
    images = torch.from_numpy(inputs.pixels(0, (case.batch, 3, side, side)))
    texts = open_clip.get_tokenizer(checkpoint.stem)(["a photo of a dog"] * case.batch)
    if case.work == "image":
        return lambda _: lambda: model.encode_image(images)
    return lambda _: lambda: model.encode_text(texts)
