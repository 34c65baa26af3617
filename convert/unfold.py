"""Canonical tensors as their sources hold them: folding, fusing and renaming, backwards.

Names are the converter's common ones: timm's for image towers, Hugging Face's for the decoder,
open_clip's for the rest. Packed layers are split as they are, for their rows are packed one by
one. Nothing is computed before a tensor is asked for.
"""

import re

import mlx.core as mx

from mlx_fastvlm.config import FastVLMConfig, Qwen2Config
from mlx_mobileclip.clip import MobileCLIPConfig
from mlx_mobileclip.vit import STEM_SIZES, ViTConfig

from .quantize import Tensors

BATCH_NORM_EPS = 1e-5
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
# Canonical name -> common, each table applied in order.
Names = tuple[tuple[str, str], ...]
FASTVIT_NAMES = (
    (r"^stem\.conv[._]", "stem.0.reparam_conv."),
    (r"^stem\.depthwise[._]", "stem.1.reparam_conv."),
    (r"^stem\.pointwise\.", "stem.2.reparam_conv."),
    (r"\.downsample\.depthwise\.", ".downsample.proj.0.reparam_conv."),
    (r"\.downsample\.se\.", ".downsample.proj.0.se."),
    (r"\.downsample\.pointwise\.", ".downsample.proj.1.reparam_conv."),
    (r"\.pos_emb\.(?:conv\.)?", ".pos_emb.reparam_conv."),
    (r"\.token_mixer\.norm\.", ".norm."),
    (r"\.token_mixer\.conv\.", ".token_mixer.reparam_conv."),
    (r"\.mlp\.conv\.", ".mlp.conv.conv."),
    (r"^final_conv\.depthwise\.", "final_conv.reparam_conv."),
)
VIT_NAMES = (
    (r"^stem\.convs\.(\d)\.", r"patch_embed.backbone.\1.conv."),
    (r"^class_token$", "cls_token"),
    (r"^positions$", "pos_embed"),
    (r"^layers\.(\d+)\.(qkv|proj)\.", r"blocks.\1.attn.\2."),
    (r"^layers\.(\d+)\.(fc[12])\.", r"blocks.\1.mlp.\2."),
    (r"^layers\.", "blocks."),
)
TEXT_NAMES = (
    (r"^embedding\.", "token_embedding."),
    (r"^positions$", "positional_embedding"),
    (r"^norm\.", "ln_final."),
    (r"^projection\.weight$", "text_projection"),
    (r"\.norm([12])\.", r".ln_\1."),
    (r"\.qkv\.", ".attn.in_proj_"),
    (r"\.proj\.", ".attn.out_proj."),
    (r"\.fc1\.", ".mlp.c_fc."),
    (r"\.fc2\.", ".mlp.c_proj."),
    (r"^layers\.", "transformer.resblocks."),
)
REP_MIXER_NAMES = (  # a text tower's block, to what an image tower calls its parts
    (r"^(layers\.\d+)\.mixer\.", r"\1.token_mixer.conv."),
    (r"^(layers\.\d+)\.bias$", r"\1.token_mixer.bias"),
    (r"^(layers\.\d+)\.(conv|fc1|fc2)\.", r"\1.mlp.\2."),
    (r"^layers\.", "transformer.resblocks."),
)


def unfold(config: FastVLMConfig, tensors: Tensors) -> Tensors:
    """The fused source checkpoint of a FastVLM that converts to these canonical tensors."""
    return (
        _under("vision.", unfold_tower(_inside("vision_tower.", tensors)))
        | {k: v for k, v in tensors.items() if k.startswith("projector.")}
        | split_decoder(config.text, tensors)
    )


def unfold_mobileclip(config: MobileCLIPConfig, tensors: Tensors, apple: bool) -> Tensors:
    """The fused source checkpoint of a MobileCLIP; Apple's code has the head transposed."""
    trunk, vit = _inside("image.trunk.", tensors), isinstance(config.image, ViTConfig)
    weight, bias = (tensors[f"image.projection.{kind}"] for kind in ("weight", "bias"))
    head = "image.head." if vit else "image.head.fc."
    out = _under("image.", _unfold_vit(trunk) if vit else unfold_tower(trunk))
    out |= {f"{head}weight": weight.T if apple else weight, f"{head}bias": bias}
    if config.text is not None:
        out |= _under("text.", _unfold_text(_inside("text.", tensors)))
        out["logit_scale"] = tensors["logit_scale"]
    return out


def source_paths(path: str) -> list[str]:
    """The layers of a source, by their common names, that one of the decoder was made from."""
    path = path.replace("language_model.", "model.", 1).replace("model.lm_head", "lm_head")
    parent, _, layer = path.rpartition(".")
    return [f"{parent}.{part}" for part in FUSED[layer]] if layer in FUSED else [path]


def split_decoder(config: Qwen2Config, tensors: Tensors) -> Tensors:
    """Queries, keys and values apart, gate and up apart."""
    D, kv_width = config.hidden_size, config.num_key_value_heads * config.head_dim
    ends = {3: [D, D + kv_width], 2: [config.intermediate_size], 1: []}
    out: Tensors = {}
    for name, tensor in tensors.items():
        if name.startswith("language_model."):
            path, _, kind = name.rpartition(".")
            paths = source_paths(path)
            rows = mx.split(tensor, ends[len(paths)]) if len(paths) > 1 else [tensor]
            out |= {f"{p}.{kind}": part for p, part in zip(paths, rows, strict=True)}
    return out


def unfold_tower(folded: Tensors) -> Tensors:
    """A FastViT tower with every module's branches fused.

    Folding forgets what it combined. What the fused source keeps apart is filled in so that it
    changes nothing: layer scales of one, and BatchNorms that return their input. What MobileCLIP's
    BatchNorms add before attention stays in a bias of qkv, which no source has.
    """
    out: Tensors = {}
    for name, tensor in folded.items():
        if ".odd." in name:
            continue
        if ".even." in name:
            halves = mx.stack([tensor, folded[name.replace(".even.", ".odd.")]], axis=1)
            name, tensor = name.replace(".even.", "."), halves.reshape(-1, *tensor.shape[1:])
        if name.endswith(".token_mixer.bias"):
            attention = name.replace(".bias", ".proj.weight") in folded
            name = name.replace(".bias", ".proj.bias" if attention else ".reparam_conv.bias")
        if tensor.ndim == 4:
            tensor = tensor.transpose(0, 3, 1, 2)  # (O, H, W, I) to (O, I, H, W)
        elif tensor.ndim == 2 and ".token_mixer." not in name:
            tensor = tensor[:, :, None, None]  # a 1x1 convolution
        out[_renamed(name, FASTVIT_NAMES)] = tensor
    for name, kernel in list(out.items()):
        if name.endswith(".mlp.conv.conv.weight"):
            out |= _fill_in(name.removesuffix(".mlp.conv.conv.weight"), kernel, out)
    return out


def _fill_in(block: str, kernel: mx.array, tensors: Tensors) -> Tensors:
    """Scales and BatchNorms of a block, which change nothing."""
    one = mx.ones((len(kernel), 1, 1), kernel.dtype)
    out = _identity_norm(f"{block}.mlp.conv.bn", kernel)
    if f"{block}.token_mixer.proj.weight" not in tensors:
        return out | {f"{block}.layer_scale.gamma": one}
    if f"{block}.norm.weight" not in tensors:
        out |= _identity_norm(f"{block}.norm", kernel)
    return out | {f"{block}.layer_scale_{i}.gamma": one for i in (1, 2)}


def _identity_norm(dst: str, kernel: mx.array) -> Tensors:
    """A BatchNorm of gain 1: to 7e-9 in float32, to 5e-6 where half precision stores 1."""
    channels, dtype = (len(kernel),), kernel.dtype
    ones, zeros = mx.ones(channels, dtype), mx.zeros(channels, dtype)
    variance = mx.full(channels, 1 - BATCH_NORM_EPS, dtype)
    names = ("weight", "bias", "running_mean", "running_var")
    values = (ones, zeros, zeros, variance)
    return {f"{dst}.{name}": value for name, value in zip(names, values, strict=True)}


def _unfold_vit(folded: Tensors) -> Tensors:
    """A vision transformer; a BatchNorm of its stem is where the convolution's bias goes."""
    names: Names = VIT_NAMES
    if "stem.convs.1.weight" not in folded:
        names = ((r"^stem\.convs\.0\.", "patch_embed.proj."), *names)
    out = {
        _renamed(name, names): value.transpose(0, 3, 1, 2) if value.ndim == 4 else value
        for name, value in folded.items()
    }
    for i in range(len(STEM_SIZES) - 1):
        layer = f"patch_embed.backbone.{i}"
        if f"{layer}.conv.bias" in out:
            bias = out.pop(f"{layer}.conv.bias")
            out |= _identity_norm(f"{layer}.bn", bias) | {f"{layer}.bn.bias": bias}
    return out


def _unfold_text(folded: Tensors) -> Tensors:
    """A text tower; its RepMixer blocks are an image tower's, but for kernels of height 1."""
    out: Tensors = {}
    blocks: Tensors = {}
    for name, tensor in folded.items():
        if ".".join(name.split(".")[:2]) + ".mixer.weight" in folded:
            kernel = tensor.ndim == 3
            blocks[_renamed(name, REP_MIXER_NAMES)] = tensor[:, None] if kernel else tensor
        else:
            out[_renamed(name, TEXT_NAMES)] = tensor.T if name == "projection.weight" else tensor
    return out | unfold_tower(blocks)


def _renamed(name: str, names: Names) -> str:
    for pattern, replacement in names:
        name = re.sub(pattern, replacement, name)
    return name


def _inside(prefix: str, tensors: Tensors) -> Tensors:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _under(prefix: str, tensors: Tensors) -> Tensors:
    return {f"{prefix}{k}": v for k, v in tensors.items()}
