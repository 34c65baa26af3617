"""Write a FastVLM as other runtimes load it: mlx-vlm's layout, and transformers'.

Source of the configs: mlx-vlm 0.7.10 `models/fastvlm/config.py`, transformers 5.23
`models/fast_vlm/configuration_fast_vlm.py`.
"""

from dataclasses import asdict, replace
from typing import Any

import mlx.core as mx

from mlx_fastvlm.config import FastVLMConfig
from mlx_fastvlm.tokenizer import Tokenizer
from mlx_mobileclip.errors import ConfigError
from mlx_mobileclip.quantization import Packed, Quantization

from .layouts import LAYOUTS, Layout, names
from .unfold import Tensors, unfold

TARGETS = {"mlx-vlm": "mlx-vlm", "transformers": "fast_vlm"}  # option: name of the layout
IMAGE_TOKEN_ID = 151646  # what both put where an image goes; no text has it
FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def interchange(
    config: FastVLMConfig, tensors: Tensors, target: str
) -> tuple[dict[str, Any], Tensors]:
    """config.json and lazy tensors of a canonical checkpoint in another layout.

    Args:
        config: Of the canonical checkpoint.
        tensors: Its tensors.
        target: One of TARGETS.

    Raises:
        ConfigError: the layout cannot hold this model.
    """
    layout = next(layout for layout in LAYOUTS if layout.name == TARGETS[target])
    if config.quantization and target == "transformers":
        raise ConfigError("transformers loads no weights that MLX has packed; add --dequantize")
    if any(path.startswith("vision_tower.") for path in config.quantization):
        raise ConfigError("mlx-vlm loads no packed image tower; quantise without the part vision")
    name = names(layout, config.vision, config.projector_type)
    renamed = {name(common): _as_in(layout, common, t) for common, t in unfold(config, tensors).items()}
    if target == "transformers":
        return _transformers_config(config), renamed
    return _mlx_vlm_config(config, name), renamed


def _as_in(layout: Layout, common: str, tensor: mx.array) -> mx.array:
    """Convolutions and layer scales in the layout's order of axes."""
    if not layout.nhwc or not common.startswith("vision."):
        return tensor
    if tensor.ndim == 4:
        return tensor.transpose(0, 2, 3, 1)
    return tensor.reshape(1, 1, -1) if "layer_scale" in common else tensor
