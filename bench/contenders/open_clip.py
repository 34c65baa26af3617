"""open_clip's MobileCLIP in PyTorch, reparameterised."""

from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file

from .. import inputs
from ..cases import Case
from . import Repeat
from .pytorch import set_up, synchronized

import open_clip  # isort: skip (after pytorch)
from timm.utils.model import reparameterize_model  # isort: skip


def prepare(case: Case, checkpoint: Path) -> Repeat:
    device, dtype = set_up(case)
    model: Any = open_clip.create_model(checkpoint.stem)
    state = {key: torch.from_numpy(value) for key, value in load_file(checkpoint).items()}
    model.load_state_dict(state, strict=True)
    model = reparameterize_model(model.eval()).to(device, dtype)
    side = model.visual.image_size
    side = side[0] if isinstance(side, tuple) else side
    images = torch.from_numpy(inputs.pixels(0, (case.batch, 3, side, side)))
    images = images.to(device, dtype)
    texts = open_clip.get_tokenizer(checkpoint.stem)(["a photo of a dog"] * case.batch).to(device)
    if case.work == "image":
        return synchronized(lambda _: lambda: model.encode_image(images), device)
    return synchronized(lambda _: lambda: model.encode_text(texts), device)
