"""FastVLM of this package and of mlx-vlm, in every size of tests/support/synthetic.py."""

import importlib.util
import sys
from dataclasses import fields
from typing import Any

import synthetic

from mlx_fastvlm import FastVLM
from mlx_fastvlm.models.config import FastVLMConfig, Qwen2Config
from mlx_mobileclip.models.fastvit import PRESETS

SIZES = ("0.5b", "1.5b", "7b")
RESOLUTION = 1024  # px
IMAGE_TOKENS = 256  # at that resolution
QUESTION_TOKENS = 44  # including the chat format
NO_MLX_VLM = "left out, because it is not installed; run: pip install mlx-vlm"


def text_config(size: str) -> Qwen2Config:
    """Decoder config of a published checkpoint."""
    published = synthetic.apple_config(size, RESOLUTION)
    return Qwen2Config(**{field.name: published[field.name] for field in fields(Qwen2Config)})


def config(size: str) -> FastVLMConfig:
    """Config that the converter would write for a published checkpoint."""
    published = synthetic.apple_config(size, RESOLUTION)
    return FastVLMConfig(
        text=text_config(size),
        vision=PRESETS["fastvithd"],
        projector_type=published["mm_projector_type"],
        image_size=RESOLUTION,
        image_mode=published["image_aspect_ratio"],
        max_length=published["tokenizer_model_max_length"],
    )


def ours(size: str) -> FastVLM:
    """This package's model, as initialised by its constructor."""
    model = FastVLM(config(size))
    model.eval()
    return model


def has_mlx_vlm() -> bool:
    return importlib.util.find_spec("mlx_vlm") is not None


def import_mlx_vlm() -> Any:
    """Import mlx-vlm's FastVLM module."""
    # mlx-vlm imports transformers, which imports PyTorch if it is there; hide it.
    sys.modules |= dict.fromkeys(("torch", "torchvision"))  # type: ignore[arg-type]
    from mlx_vlm.models import fastvlm

    return fastvlm


def mlx_vlm(size: str) -> Any:
    """mlx-vlm's model, as initialised by its constructor."""
    fastvlm = import_mlx_vlm()
    published = synthetic.apple_config(size, RESOLUTION)
    text, vision = fastvlm.TextConfig.from_dict(published), fastvlm.VisionConfig()
    if size == "tiny":
        vision.projection_dim //= 12  # as in synthetic.tiny
        for name, value in published["vision_config"].items():
            setattr(vision, name, value)
    config = fastvlm.ModelConfig(text, vision, mm_hidden_size=published["mm_hidden_size"])
    model = fastvlm.Model(config)
    model.eval()
    return model
