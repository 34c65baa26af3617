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
    model, images, texts = load(case, checkpoint)
    return timed(model, images, texts, case)


def load(case: Case, checkpoint: Path) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The model on its device, images (B, 3, S, S) and texts (B, L)."""
    device, dtype = set_up(case)
    model: Any = open_clip.create_model(checkpoint.stem)
    state = {key: torch.from_numpy(value) for key, value in load_file(checkpoint).items()}
    model.load_state_dict(state, strict=True)
    model = reparameterize_model(model.eval()).to(device, dtype)
    return model, *model_inputs(model, checkpoint.stem, case.batch, device, dtype)


def model_inputs(
    model: Any, name: str, batch: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of noise (B, 3, S, S) and texts (B, L) for a model."""
    side = model.visual.image_size
    side = side[0] if isinstance(side, tuple) else side
    images = torch.from_numpy(inputs.pixels(0, (batch, 3, side, side))).to(device, dtype)
    texts = open_clip.get_tokenizer(name)(["a photo of a dog"] * batch).to(device)
    return images, texts


def timed(model: Any, images: torch.Tensor, texts: torch.Tensor, case: Case) -> Repeat:
    if case.work == "image":
        return synchronized(lambda _: lambda: model.encode_image(images), images.device)
    return synchronized(lambda _: lambda: model.encode_text(texts), images.device)
