"""Towers that no reference package has, in NumPy float64, from their published definitions.

Nothing is folded, fused or shared with the tested code: BatchNorm is computed where training has
it, convolutions are sums of shifted products. Tensor names are Apple's.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Tensors = dict[str, NDArray[np.float32]]
BATCH_NORM_EPS = 1e-5

_erf: Callable[[Array], Array] = np.vectorize(math.erf, otypes=[np.float64])


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


def layer_norm(x: Array, t: Tensors, name: str, eps: float) -> Array:
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + eps) * t[f"{name}.weight"] + t[f"{name}.bias"]


def batch_norm(x: Array, t: Tensors, name: str) -> Array:
    """BatchNorm in inference, over the last axis."""
    deviation = np.sqrt(t[f"{name}.running_var"].astype(np.float64) + BATCH_NORM_EPS)
    return (x - t[f"{name}.running_mean"]) / deviation * t[f"{name}.weight"] + t[f"{name}.bias"]


def softmax(x: Array) -> Array:
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def transformer(x: Array, t: Tensors, name: str, heads: int, eps: float, causal: bool) -> Array:
    """One pre-norm layer; x is (L, D)."""
    L, D = x.shape
    y = layer_norm(x, t, f"{name}.pre_norm_mha.0", eps)
    mha = f"{name}.pre_norm_mha.1"
    qkv = y @ t[f"{mha}.qkv_proj.weight"].T + t[f"{mha}.qkv_proj.bias"]
    queries, keys, values = np.split(qkv, 3, axis=1)
    size = D // heads
    parts = []
    for head in range(heads):
        columns = slice(head * size, (head + 1) * size)
        scores = queries[:, columns] @ keys[:, columns].T / math.sqrt(size)
        if causal:
            scores[np.triu_indices(L, 1)] = -np.inf
        parts.append(softmax(scores) @ values[:, columns])
    attended = np.concatenate(parts, axis=1)
    x = x + attended @ t[f"{mha}.out_proj.weight"].T + t[f"{mha}.out_proj.bias"]
    ffn = f"{name}.pre_norm_ffn"
    y = layer_norm(x, t, f"{ffn}.0", eps)
    y = gelu(y @ t[f"{ffn}.1.weight"].T + t[f"{ffn}.1.bias"])
    return x + y @ t[f"{ffn}.4.weight"].T + t[f"{ffn}.4.bias"]


def depthwise_conv1d(x: Array, weight: Array) -> Array:
    """Depthwise convolution of (L, C) with (C, 1, 1, 11), zeros beyond both ends."""
    kernel = weight[:, 0, 0]
    size = kernel.shape[1]
    padded = np.pad(x, ((size // 2, size // 2), (0, 0)))
    return np.sum([padded[i : i + len(x)] * kernel[:, i] for i in range(size)], axis=0)


def rep_mixer_block(x: Array, t: Tensors, name: str) -> Array:
    mixer = f"{name}.token_mixer"
    fused = f"{mixer}.reparam_conv"
    if f"{fused}.weight" in t:  # the residual is inside the kernel
        x = depthwise_conv1d(x, t[f"{fused}.weight"]) + t[f"{fused}.bias"]
    else:
        convolved = depthwise_conv1d(x, t[f"{mixer}.mixer.rbr_conv.0.conv.weight"])
        mixed = batch_norm(convolved, t, f"{mixer}.mixer.rbr_conv.0.bn")
        mixed = mixed + batch_norm(x, t, f"{mixer}.mixer.rbr_skip")
        mixed = mixed - batch_norm(x, t, f"{mixer}.norm.rbr_skip")
        x = x + t[f"{mixer}.layer_scale"][:, 0, 0] * mixed
    ffn = f"{name}.convffn"
    y = batch_norm(depthwise_conv1d(x, t[f"{ffn}.conv.conv.weight"]), t, f"{ffn}.conv.bn")
    y = gelu(y @ t[f"{ffn}.fc1.weight"][:, :, 0, 0].T + t[f"{ffn}.fc1.bias"])
    y = y @ t[f"{ffn}.fc2.weight"][:, :, 0, 0].T + t[f"{ffn}.fc2.bias"]
    return x + t[f"{name}.layer_scale"][:, 0, 0] * y


def hybrid_text(t: Tensors, ids: NDArray[np.int32], heads: int) -> Array:
    """MobileCLIP-S0's text tower, one text at a time: (B, 77) to (B, E)."""
    rows = []
    names = {k.split(".")[2] for k in t if k.startswith("text_encoder.transformer.")}
    last = max(map(int, names))
    for row in ids:
        x = t["text_encoder.embedding_layer.weight"][row].astype(np.float64)
        x = x + t["text_encoder.positional_embedding.pos_embed.pos_embed"][0, 0]
        for i in range(last + 1):
            name = f"text_encoder.transformer.{i}"
            if i in (0, last):
                x = rep_mixer_block(x, t, name)
            else:
                x = transformer(x, t, name, heads, 1e-5, causal=False)
        x = layer_norm(x, t, "text_encoder.final_layer_norm", 1e-5)
        rows.append(x[int(row.argmax())] @ t["text_encoder.projection_layer"])
    return np.array(rows)


def patch_conv(x: Array, weight: Array, padding: int) -> Array:
    """Convolution whose stride is the kernel size: (H, W, I) with (O, I, k, k)."""
    size = weight.shape[2]
    x = np.pad(x, ((padding, padding), (padding, padding), (0, 0)))
    H, W = x.shape[0] // size, x.shape[1] // size
    tiles = x[: H * size, : W * size].reshape(H, size, W, size, -1)
    return np.einsum("hawbi,oiab->hwo", tiles, weight.astype(np.float64))


def vit_b(t: Tensors, pixels: Array, heads: int, padding: int, eps: float) -> Array:
    """ViT-B/16 as Apple's code builds it: (B, S, S, 3) to (B, E)."""
    p, rows = "image_encoder.model", []
    depth = 1 + max(int(k.split(".")[3]) for k in t if k.startswith(f"{p}.transformer."))
    for image in pixels:
        x = patch_conv(image, t[f"{p}.patch_emb.0.block.conv.weight"], padding)
        x = gelu(batch_norm(x, t, f"{p}.patch_emb.0.block.norm"))
        x = patch_conv(x, t[f"{p}.patch_emb.1.block.conv.weight"], 0)
        x = gelu(batch_norm(x, t, f"{p}.patch_emb.1.block.norm"))
        x = patch_conv(x, t[f"{p}.patch_emb.2.block.conv.weight"], 0)
        x = x + t[f"{p}.patch_emb.2.block.conv.bias"]
        x = x.reshape(-1, x.shape[-1]) + t[f"{p}.pos_embed.pos_embed.pos_embed"][0, 0]
        x = np.concatenate([t[f"{p}.cls_token"][0], x])
        for i in range(depth):
            x = transformer(x, t, f"{p}.transformer.{i}", heads, eps, causal=False)
        x = layer_norm(x, t, f"{p}.post_transformer_norm", eps)
        rows.append(x[0] @ t[f"{p}.classifier.proj"])
    return np.array(rows)
