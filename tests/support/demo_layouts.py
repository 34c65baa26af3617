"""Write the demo model in any layout of FastVLM checkpoints: the inverse of conversion."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import synthetic

from convert.export.unfold import unfold
from mlx_fastvlm.loader import find_checkpoint, read_canonical
from mlx_fastvlm.models.config import FastVLMConfig

# Apple's names are taken from the listing in keys/, so that they are real.


def apple_names() -> dict[str, str]:
    """Map common names to Apple's."""
    return {_common_name(key): key for key in synthetic.read_keys("apple_llava_qwen2_0.5b")}


def _common_name(apple: str) -> str:
    if apple.startswith(synthetic.TOWER):
        return f"vision.{synthetic.timm_name(apple.removeprefix(synthetic.TOWER))}"
    for i in (0, 1):
        apple = apple.replace(f"model.mm_projector.{2 * i}.", f"projector.{i}.")
    return apple


def write(
    directory: Path,
    layout: str,
    model: str | Path,
    *,
    dtype: mx.Dtype = mx.float32,
    **options: Any,
) -> Path:
    """Write a canonical checkpoint in a layout; `options` are those of `synthetic.write`."""
    source = find_checkpoint(model)
    config, canonical = read_canonical(source)
    names = apple_names()
    whole = {name: tensor.astype(mx.float32) for name, tensor in canonical.items()}
    tensors = {names[common]: np.array(tensor) for common, tensor in unfold(config, whole).items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # stored although tied
    values = _apple_config(config)
    if layout == "fast_vlm":
        tensors = synthetic.renamed(tensors, synthetic.transformers_name)
        tensors.pop("lm_head.weight")
        values = _transformers_config(config)
    elif layout == "mlx-vlm":
        tensors = synthetic.renamed(tensors, synthetic.mlx_vlm_name)
        tensors = {k: synthetic.mlx_layout(k, v) for k, v in tensors.items()}
        tensors.pop("language_model.lm_head.weight")
    elif layout == "app export":
        tensors = synthetic.renamed(tensors, synthetic.app_export_name)
        values |= {"tie_word_embeddings": False, "image_token_index": 151646}
    else:
        assert layout == "llava_qwen2"
    exact = {k: mx.array(v) for k, v in tensors.items() if k.endswith("running_var")}
    synthetic.write(directory, tensors | exact, values, dtype=dtype, **options)
    shutil.copyfile(source.path / "tokenizer.json", directory / "tokenizer.json")
    return directory


def _tower_values(config: FastVLMConfig) -> dict[str, Any]:
    values = config.vision.to_json()
    return {key: values[key] for key in ("layers", "embed_dims", "mlp_ratios")}


def _apple_config(config: FastVLMConfig) -> dict[str, Any]:
    return synthetic.apple_config(
        image_size=config.image_size,
        image_aspect_ratio=config.image_mode,
        mm_hidden_size=config.vision.features,
        mm_projector_type=config.projector_type,
        tokenizer_model_max_length=config.max_length,
        vision_config=_tower_values(config),
        **asdict(config.text),
    )


def _transformers_config(config: FastVLMConfig) -> dict[str, Any]:
    values = synthetic.transformers_config(tie_word_embeddings=config.text.tie_word_embeddings)
    values["text_config"] |= asdict(config.text)
    values["vision_config"]["hidden_size"] = config.vision.features
    values["vision_config"]["model_args"] |= _tower_values(config)
    return values
