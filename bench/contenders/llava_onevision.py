"""transformers' LLaVA-OneVision-0.5B, with random weights.

SigLIP SO400M sees an image of 1024 px as nine tiles of 384 px and once as a whole, as
llava-hf/llava-onevision-qwen2-0.5b-ov-hf does; the decoder is Qwen2-0.5B.
"""

from pathlib import Path
from typing import Any

import oracle  # noqa: F401 (first, because it makes torchvision importable)
import torch
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration
from transformers.models.llava_onevision import modeling_llava_onevision as modeling

from .. import inputs
from ..cases import Case
from . import Repeat, Work
from .pytorch import set_up, synchronized

TEXT = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 152_000,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
TINY = {"hidden_size": 56, "intermediate_size": 64, "num_hidden_layers": 1}


def prepare(case: Case, _: Path) -> Repeat:
    device, dtype = set_up(case)
    with torch.device(device):
        model: Any = LlavaOnevisionForConditionalGeneration(config(case)).eval().to(dtype)
    side, tile = case.resolution, model.config.vision_config.image_size
    tiles = tiles_per_image(model.config, side)
    images = [model.config.image_token_index] * image_tokens(model, side)

    def first(repetition: int) -> Work:
        pixels = torch.from_numpy(inputs.pixels(repetition, (1, tiles, 3, tile, tile)))
        question = inputs.text_ids(repetition, case.tokens).tolist()
        arguments = {
            "input_ids": torch.tensor([images + question]).to(device),
            "pixel_values": pixels.to(device, dtype),
            "image_sizes": torch.tensor([[side, side]]).to(device),
        }
        return lambda: model(**arguments, logits_to_keep=1).logits.argmax()

    return synchronized(first, device)


def prompt_tokens(case: Case) -> int:
    with torch.device("meta"):
        model = LlavaOnevisionForConditionalGeneration(config(case))
    return image_tokens(model, case.resolution) + case.tokens


def config(case: Case) -> LlavaOnevisionConfig:
    """transformers' defaults for the vision tower and tiling, which are those of the checkpoint."""
    if case.size != "tiny":
        return LlavaOnevisionConfig(text_config=TEXT)
    config = LlavaOnevisionConfig(text_config=TEXT | TINY)
    for name, value in (TINY | {"num_attention_heads": 4}).items():
        setattr(config.vision_config, name, value)
    return config


def tiles_per_image(config: LlavaOnevisionConfig, side: int) -> int:
    """Tiles of a square image, the view of the whole included."""
    tile, grids = config.vision_config.image_size, config.image_grid_pinpoints
    count: int = modeling.image_size_to_num_patches([side, side], grids, tile)
    return count


def image_tokens(model: Any, side: int) -> int:
    """Tokens of one square image, as the model itself packs them."""
    config, newline = model.config, model.model.image_newline
    per_tile = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    features = newline.new_zeros(tiles_per_image(config, side), per_tile, len(newline))
    packed, _ = model.model.pack_image_features(
        [features], torch.tensor([[side, side]]), newline, config.vision_aspect_ratio
    )
    return len(packed[0])
