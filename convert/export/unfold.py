"""Convert canonical tensors back to those of a source checkpoint, the inverse of reading it.

Names are the common ones of the loader: timm's for the image tower, Hugging Face's for the decoder.
Quantised layers are split without being dequantised, as each row is quantised separately. All
tensors are lazy.
"""

import re
from collections.abc import Iterable

import mlx.core as mx

from mlx_fastvlm.models.config import FastVLMConfig, Qwen2Config
from mlx_mobileclip.checkpoints.reparameterize import BATCH_NORM_EPS
from mlx_mobileclip.checkpoints.source import Tensors

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
# Patterns of canonical names and their replacements in common names, applied in order.
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


def unfold(config: FastVLMConfig, tensors: Tensors) -> Tensors:
    """Convert canonical tensors back to those of a source checkpoint.

    Args:
        config: Config of the FastVLM.
        tensors: Its canonical tensors.

    Returns:
        Tensors by common name, the image tower's with fused branches.
    """
    return (
        add_prefix("vision.", unfold_tower(strip_prefix("vision_tower.", tensors)))
        | {k: v for k, v in tensors.items() if k.startswith("projector.")}
        | split_decoder(config.text, tensors)
    )


def source_paths(path: str) -> list[str]:
    """Common names of the source layers that a layer of the decoder was fused from."""
    path = path.replace("language_model.", "model.", 1).replace("model.lm_head", "lm_head")
    parent, _, layer = path.rpartition(".")
    return [f"{parent}.{part}" for part in FUSED[layer]] if layer in FUSED else [path]


def split_decoder(config: Qwen2Config, tensors: Tensors) -> Tensors:
    """Split the fused layers of the decoder: queries, keys and values; gate and up."""
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
    """Convert a FastViT tower to timm's names and shapes, with fused branches.

    What was folded cannot be separated, so layer scales become 1 and BatchNorms the identity.
    The shift of a MobileCLIP's BatchNorm before attention stays in a bias of qkv, which no source
    has.
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
        out[rename(name, FASTVIT_NAMES)] = tensor
    for name, kernel in list(out.items()):
        if name.endswith(".mlp.conv.conv.weight"):
            out |= _identities(name.removesuffix(".mlp.conv.conv.weight"), kernel, out)
    return out


def _identities(block: str, kernel: mx.array, tensors: Tensors) -> Tensors:
    """Layer scales and BatchNorms of a block, all the identity."""
    one = mx.ones((len(kernel), 1, 1), kernel.dtype)
    out = identity_norm(f"{block}.mlp.conv.bn", kernel)
    if f"{block}.token_mixer.proj.weight" not in tensors:
        return out | {f"{block}.layer_scale.gamma": one}
    if f"{block}.norm.weight" not in tensors:
        out |= identity_norm(f"{block}.norm", kernel)
    return out | {f"{block}.layer_scale_{i}.gamma": one for i in (1, 2)}


def identity_norm(dst: str, kernel: mx.array) -> Tensors:
    """Tensors of an identity BatchNorm, for the channels and dtype of a kernel.

    Its gain differs from 1 by 7e-9 in float32, and by 5e-6 in half precision, where the variance
    is 1.
    """
    channels, dtype = (len(kernel),), kernel.dtype
    ones, zeros = mx.ones(channels, dtype), mx.zeros(channels, dtype)
    variance = mx.full(channels, 1 - BATCH_NORM_EPS, dtype)
    names = ("weight", "bias", "running_mean", "running_var")
    values = (ones, zeros, zeros, variance)
    return {f"{dst}.{name}": value for name, value in zip(names, values, strict=True)}


def rename(name: str, names: Iterable[tuple[str, str]]) -> str:
    """Replace each pattern in a name, in order."""
    for pattern, replacement in names:
        name = re.sub(pattern, replacement, name)
    return name


def strip_prefix(prefix: str, tensors: Tensors) -> Tensors:
    """Select the tensors whose names begin with a prefix, and remove it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def add_prefix(prefix: str, tensors: Tensors) -> Tensors:
    """Add a prefix to the names of all tensors."""
    return {f"{prefix}{k}": v for k, v in tensors.items()}
