"""Synthetic MobileCLIP checkpoints: random values with the names of any layout.

The name maps between layouts are written independently of the converter's, from Apple's names to
open_clip's, to check them.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from synthetic import read_keys
from torch_file import write_torch

from mlx_mobileclip.models.clip import MobileCLIPConfig
from mlx_mobileclip.models.fastvit import FastViTConfig
from mlx_mobileclip.models.variants import VARIANTS
from mlx_mobileclip.models.vit import ViTConfig

Shapes = dict[str, tuple[int, ...]]
Tensors = dict[str, np.ndarray]

TEXT_SHRINK = 16  # text towers and the joint space become 32 or 48 wide
TEXT_HEADS_SHRINK = 4
TINY_STAGE = 4  # channels of a FastViT tower's first stage; attention is then 32 wide or more
# Blocks per stage: one more where the published tower is deeper or wider than the next smaller one.
TINY_BLOCKS = {
    "s0": (1, 1, 1, 1),
    "s1": (1, 2, 1, 1),
    "s2": (1, 2, 2, 1),
    "s3": (1, 1, 1, 1, 1),
    "s4": (1, 1, 1, 1, 2),
}
DEPTH = 2  # transformer layers kept
APPLE_STAGE = {0: 0, 1: 1, 2: 1, 3: 2, 4: 2, 5: 3, 6: 3, 7: 3}  # by the N of network.N
PUBLISHED = [name for name in VARIANTS if ":" not in name]


def size_of(variant: str) -> str:
    """The size (S0 to S4, B, L-14) as in the file names of keys/."""
    return variant.split("-", 1)[1].removesuffix("-LT").lower().replace("-", "_")


def listing(variant: str, layout: str, fused: bool = False) -> Shapes:
    """Names and shapes of a published checkpoint; "timm" is open_clip's trunk alone."""
    size = size_of(variant)
    if layout == "apple":
        branches = "fused" if fused and size != "b" else "unfused"
        return read_keys(f"mobileclip_apple_{size}_{branches}")
    shapes = read_keys(f"mobileclip_openclip_{size}_unfused")
    if fused and size not in ("b", "l_14"):
        rest = {k: s for k, s in shapes.items() if not k.startswith("visual.")}
        trunk = read_keys(f"mobileclip_openclip_{size}_visual_fused")
        shapes = rest | {f"visual.{k}": s for k, s in trunk.items()}
    if layout == "timm":
        prefix = "visual.trunk."
        return {k[len(prefix) :]: s for k, s in shapes.items() if k.startswith(prefix)}
    return shapes


def layouts_of(variant: str) -> list[str]:
    """Layouts of a variant: Apple's for S0, S1, S2 and B; open_clip and timm for all but S0."""
    apple = ["apple"] if variant in VARIANTS and variant.startswith("MobileCLIP-") else []
    apple = apple if size_of(variant) in ("s0", "s1", "s2", "b") else []
    return apple + ([] if variant == "MobileCLIP-S0" else ["open_clip", "timm"])


def tiny_config(variant: str) -> MobileCLIPConfig:
    """The variant with narrow, shallow towers, which differ where the published ones do."""
    config = VARIANTS[variant]
    text = config.text
    assert text is not None
    image: FastViTConfig | ViTConfig
    if isinstance(config.image, ViTConfig):
        patch = config.image.patch_size
        image = replace(config.image, image_size=4 * patch, width=32, layers=DEPTH, heads=2)
    else:
        stages = len(config.image.layers)
        image = replace(
            config.image,
            layers=TINY_BLOCKS[size_of(variant)],
            embed_dims=tuple(TINY_STAGE * 2**i for i in range(stages)),
        )
    size = image.image_size if isinstance(image, ViTConfig) else 64
    width, heads = text.width // TEXT_SHRINK, text.heads // TEXT_HEADS_SHRINK
    text = replace(text, width=width, layers=DEPTH, heads=heads)
    preprocess = replace(config.preprocess, image_size=size)
    return replace(config, image=image, text=text, embed_dim=width, preprocess=preprocess)


def _shrink(value: int, full: int, tiny: int) -> int:
    """Scale a size that depends on a width; others (3 channels, kernels, heads) stay."""
    return value * tiny // full if value * tiny % full == 0 and value >= full // 32 else value


def tiny_shapes(variant: str, layout: str, fused: bool = False) -> Shapes:
    """A published listing shrunk to fit `tiny_config`."""
    config, tiny = VARIANTS[variant], tiny_config(variant)
    assert config.text is not None and tiny.text is not None
    vit = isinstance(config.image, ViTConfig)
    full_width = config.image.width if isinstance(config.image, ViTConfig) else None
    width = (full_width, 32) if full_width else (config.image.features, tiny.image.features)
    last_text = config.text.layers + 1
    result: Shapes = {}
    for key, shape in listing(variant, layout, fused).items():
        text = key.startswith(("text.", "text_encoder."))
        layer = re.search(r"(?:resblocks|transformer|blocks)\.(\d+)\.", key)
        index = int(layer[1]) if layer else 0
        if text and config.text.rep_mixers and layer:
            if DEPTH < index < last_text:
                continue
            if index == last_text:
                key = key.replace(f".{index}.", f".{DEPTH + 1}.", 1)
        elif text or vit:
            if index >= DEPTH:
                continue
        elif isinstance(tiny.image, FastViTConfig):
            stage, block = _block(key)
            if block >= tiny.image.layers[stage]:
                continue
        if text or key == "logit_scale":
            widths = config.text.width, tiny.text.width
            result[key] = tuple(n if n in (49408, 77) else _shrink(n, *widths) for n in shape)
        elif "head" in key or "classifier" in key:
            sizes = {config.embed_dim: tiny.embed_dim, config.image.features: width[1]}
            if config.embed_dim == config.image.features:
                sizes = {config.embed_dim: tiny.embed_dim}
            result[key] = tuple(sizes[n] for n in shape)
        elif isinstance(tiny.image, ViTConfig) and "pos_embed" in key:
            rows = tiny.image.patches + (tiny.image.stem == "patch")
            result[key] = (*shape[:-2], rows, 32)
        elif "patch_embed.proj" in key:
            result[key] = (32, *shape[1:])
        else:
            kernel = shape[2:] if len(shape) == 4 else ()
            result[key] = (
                *(_shrink(n, *width) if n > 3 else n for n in shape[: len(shape) - len(kernel)]),
                *kernel,
            )
    return result


def _block(key: str) -> tuple[int, int]:
    """Stage and index of a tensor's FastViT block; (0, 0) outside of blocks."""
    found = re.search(r"stages\.(\d+)\.blocks\.(\d+)\.", key)
    if found:
        return int(found[1]), int(found[2])
    found = re.search(r"network\.(\d)\.(\d+)\.", key)
    return (APPLE_STAGE[int(found[1])], int(found[2])) if found else (0, 0)


def values(shapes: Shapes, seed: int = 0) -> Tensors:
    """Random tensors as training might leave them: BatchNorm, biases and scales non-trivial."""
    rng = np.random.default_rng(seed)
    result: Tensors = {}
    for name, shape in shapes.items():
        unit = rng.random(shape, dtype=np.float32)
        if name.endswith("num_batches_tracked"):
            result[name] = np.array(7, np.int64)
        elif name == "logit_scale":
            result[name] = np.array(4.2, np.float32)
        elif name.endswith("running_var"):
            result[name] = 0.5 + unit
        elif "layer_scale" in name:
            result[name] = 0.1 + 0.2 * unit
        elif len(shape) == 1 and name.endswith("weight"):
            result[name] = 0.75 + 0.5 * unit
        elif len(shape) < 2:
            result[name] = 0.4 * (unit - 0.5)
        elif "pos" in name or "embedding" in name or "cls" in name:
            result[name] = unit - 0.5
        else:
            fan_in = shape[0] if name.endswith("proj") else int(np.prod(shape[1:]))
            result[name] = (unit - 0.5) * np.float32(2 * (3 / fan_in) ** 0.5)
            if len(shape) == 4 and re.search(r"(token_mixer|pos_emb|network\.6)\.reparam", name):
                result[name] *= np.float32(0.3)  # a layer scale and the residual, fused
                result[name][:, 0, shape[2] // 2, shape[3] // 2] += 1
    return result


# Apple's names to open_clip's


def open_clip_tensors(apple: Tensors) -> Tensors:
    """An Apple checkpoint with open_clip's names, projections transposed."""
    result: Tensors = {}
    for key, value in apple.items():
        if key.startswith("image_encoder.model."):
            part = key.removeprefix("image_encoder.model.")
            vit = any("patch_emb." in k for k in apple)
            new = _vit_name(part) if vit else _fastvit_name(part, apple)
            if new.startswith("head."):
                value = value.T
                bias = np.zeros(value.shape[0], np.float32)
                result["visual.trunk." + new.replace("weight", "bias")] = bias
            if new == "pos_embed":
                value = value[0]
            result["visual.trunk." + new] = value
        elif key.startswith("text_encoder."):
            new = _text_name(key.removeprefix("text_encoder."))
            result["text." + new] = value[0, 0] if new == "positional_embedding" else value
        else:
            result[key] = value
    return result


def _replaced(key: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for old, new in pairs:
        key = key.replace(old, new)
    return key


def _vit_name(key: str) -> str:
    return _replaced(
        key,
        (
            ("patch_emb.", "patch_embed.backbone."),
            ("block.conv", "conv"),
            ("block.norm", "bn"),
            ("pos_embed.pos_embed.pos_embed", "pos_embed"),
            ("post_transformer_norm", "norm"),
            ("pre_norm_mha.0", "norm1"),
            ("pre_norm_mha.1.qkv_proj", "attn.qkv"),
            ("pre_norm_mha.1.out_proj", "attn.proj"),
            ("pre_norm_ffn.0", "norm2"),
            ("pre_norm_ffn.1", "mlp.fc1"),
            ("pre_norm_ffn.4", "mlp.fc2"),
            ("transformer.", "blocks."),
            ("classifier.proj", "head.weight"),
        ),
    )


def _text_name(key: str) -> str:
    return _replaced(
        key,
        (
            ("projection_layer", "text_projection"),
            ("embedding_layer", "token_embedding"),
            ("positional_embedding.pos_embed.pos_embed", "positional_embedding"),
            ("final_layer_norm", "ln_final"),
            ("pre_norm_mha.0", "ln_1"),
            ("pre_norm_mha.1.qkv_proj.", "attn.in_proj_"),
            ("pre_norm_mha.1.out_proj", "attn.out_proj"),
            ("pre_norm_ffn.0", "ln_2"),
            ("pre_norm_ffn.1", "mlp.c_fc"),
            ("pre_norm_ffn.4", "mlp.c_proj"),
            ("transformer.", "transformer.resblocks."),
        ),
    )


def _fastvit_name(key: str, apple: Tensors) -> str:
    """Apple's name to timm's; network.N are blocks, downsampling, blocks, ..., 6 positions."""
    kind = {1: "downsample", 3: "downsample", 5: "downsample", 6: "pos_emb"}
    found = re.match(r"network\.(\d)\.", key)
    if found:
        i = int(found[1])
        rest = key[found.end() :]
        if i == 6:
            rest = re.sub(r"^pe\.", "pos_enc.", rest)
        key = f"stages.{APPLE_STAGE[i]}.{kind.get(i, 'blocks')}.{rest}"
    key = _replaced(
        key,
        (
            ("patch_embed.", "stem."),
            ("conv_exp.", "final_conv."),
            ("lkb_reparam", "reparam_conv"),
            ("lkb_origin", "large_conv"),
            ("convffn.", "mlp."),
            (".se.reduce.", ".se.fc1."),
            (".se.expand.", ".se.fc2."),
            ("rbr_conv", "conv_kxk"),
            ("rbr_scale", "conv_scale"),
            ("rbr_skip", "identity"),
            ("head.proj", "head.fc.weight"),
        ),
    )
    return re.sub(r"(layer_scale(_\d)?)$", r"\1.gamma", key)


def write(path: Path, tensors: dict[str, Any], dtype: mx.Dtype = mx.float32) -> Path:
    """Write one file in the format of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix != ".safetensors":
        write_torch(path, tensors, dtype)
        return path
    arrays = {k: mx.array(v) for k, v in tensors.items()}
    cast = {k: v.astype(dtype) if v.dtype == mx.float32 else v for k, v in arrays.items()}
    mx.save_safetensors(str(path), cast, metadata={"format": "pt"})
    return path
