"""OpenAI's CLIP ViT-B/16 in open_clip, with random weights."""

from pathlib import Path
from typing import Any

from ..cases import Case
from . import Repeat
from .open_clip import model_inputs, timed
from .pytorch import set_up

import open_clip  # isort: skip (after pytorch)

NAME = "ViT-B-16-quickgelu"  # the activation that OpenAI trained with


def prepare(case: Case, _: Path) -> Repeat:
    device, dtype = set_up(case)
    model: Any = open_clip.create_model(NAME).eval().to(device, dtype)
    return timed(model, *model_inputs(model, NAME, case.batch, device, dtype), case)
