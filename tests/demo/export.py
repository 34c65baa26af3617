"""Convert trained PyTorch weights to canonical checkpoints, by the layouts that `load` reads."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from reference import FastVLM, MobileCLIP
from safetensors.numpy import save_file
from torch import nn

from convert.write import new_directory, write_json, write_tensors
from mlx_fastvlm import loader
from mlx_fastvlm.models.fastvlm import FastVLM as MLXFastVLM
from mlx_mobileclip.checkpoints.apple_names import apple_tower_name, network_indices
from mlx_mobileclip.checkpoints.hub import Checkpoint
from mlx_mobileclip.checkpoints.mobileclip import MOBILECLIP_LAYOUTS, canonical_tensors
from mlx_mobileclip.checkpoints.weights import assign, named_parameters
from mlx_mobileclip.models.clip import MobileCLIP as MLXMobileCLIP
from mlx_mobileclip.models.clip import MobileCLIPConfig, PreprocessConfig
from mlx_mobileclip.models.fastvit import PRESETS, FastViTConfig
from mlx_mobileclip.models.text import TextConfig

VISION = "model.vision_tower.vision_tower.model."
OPEN_CLIP = next(layout for layout in MOBILECLIP_LAYOUTS if layout.name == "open_clip")


def tower_config(preset: str, shape: dict[str, Any]) -> FastViTConfig:
    """Config of a published tower with other dimensions."""
    values = PRESETS[preset].to_json() | {key: tuple(value) for key, value in shape.items()}
    values["mlp_ratios"] = tuple(float(ratio) for ratio in values["mlp_ratios"])
    return FastViTConfig(**values)


def half(module: nn.Module) -> dict[str, Any]:
    """State dict of a module in float16, without BatchNorm's step counters."""
    return {
        name: np.ascontiguousarray(value.numpy().astype(np.float16))
        for name, value in module.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


def write_apple_fastvlm(
    model: FastVLM, tower: dict[str, Any], text: dict[str, Any], side: int, directory: Path
) -> None:
    """Write Apple's layout (llava_qwen2), the tower with all its branches and BatchNorms."""
    network = network_indices(tower_config("fastvithd", tower))
    tensors = {VISION + apple_tower_name(k, network): v for k, v in half(model.tower.trunk).items()}
    tensors |= {f"model.mm_projector.{k}": v for k, v in half(model.mm_projector).items()}
    tensors |= half(model.decoder)
    config = {
        "architectures": ["LlavaQwen2ForCausalLM"],
        "model_type": "llava_qwen2",
        "mm_vision_tower": f"mobileclip_l_{side}",
        "mm_projector_type": "mlp2x_gelu",
        "image_aspect_ratio": "pad",
        "tokenizer_model_max_length": text["max_position_embeddings"],
        "vision_config": tower,
        **text,
    }
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    save_file(tensors, directory / "model.safetensors")


def convert_fastvlm(source: Path, target: Path) -> None:
    """Convert Apple's layout to the canonical one, in float16."""
    checkpoint = Checkpoint(source, "trained by tests/demo/train_fastvlm.py")
    config, tensors = loader.read_canonical(checkpoint)
    tokenizer = loader.read_tokenizer(checkpoint, config)
    shutil.rmtree(target, ignore_errors=True)
    model = MLXFastVLM(config)
    assign(model, tensors, mx.float16, checkpoint.name)
    with new_directory(target) as directory:
        write_tensors(directory, named_parameters(model))
        write_json(directory / "config.json", config.to_json())
        tokenizer.save(directory / "tokenizer.json")


def convert_mobileclip(
    trained: MobileCLIP, tower: dict[str, Any], text: dict[str, int], side: int, target: Path
) -> None:
    """Convert open_clip's names to the canonical ones, and write a checkpoint in float16."""
    name = "trained by tests/demo/train_mobileclip.py"
    tensors = {f"visual.trunk.{k}": v for k, v in half(trained.tower.trunk).items()}
    tensors |= {f"visual.trunk.head.fc.{k}": v for k, v in half(trained.projection).items()}
    tensors |= {f"text.{k}": v for k, v in half(trained.text).items()}
    tensors["logit_scale"] = trained.logit_scale.detach().numpy()
    text_config = TextConfig(**text, causal=False, rep_mixers=False)
    preprocess = PreprocessConfig(side, "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    config = MobileCLIPConfig(
        "demo",
        trained.projection.out_features,
        tower_config("mci3", tower),
        text_config,
        preprocess,
        source={"model": name, "revision": None, "layout": OPEN_CLIP.name},
    )
    arrays = {key: mx.array(value) for key, value in tensors.items()}
    model = MLXMobileCLIP(config)
    assign(model, canonical_tensors(arrays, config, OPEN_CLIP, name), mx.float16, name)
    merges = (target.parent / "merges.txt").read_bytes()
    shutil.rmtree(target, ignore_errors=True)
    with new_directory(target) as directory:
        write_tensors(directory, named_parameters(model))
        write_json(directory / "config.json", config.to_json())
        (directory / "merges.txt").write_bytes(merges)
