"""Modules that are folded, run as their source holds them, in float64 NumPy.

Each is affine, so that one pass over random inputs tells it from any other: branches, BatchNorms
and layer scales one after the other, with none of the arithmetic that folds them. A module is
given by tensors under common names, of a source or of what was unfolded, and takes them.

Formulas: MobileOne (arXiv:2206.04040), section 3.2; FastViT (arXiv:2303.14189), section 3.2.
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from .source import Source
from .unfold import BATCH_NORM_EPS

Array = NDArray[np.float64]
Module = Callable[[Source, str], Array]
WINDOW = 11  # side of the inputs that a convolution sees: the largest kernel's
BRANCHES = (  # MobileOne's code has any number of equal ones; FastViT and MobileCLIP have one
    *("conv_scale", "large_conv", "small_conv"),
    *(f"conv_kxk.{i}" for i in range(4)),
)


def kernel(source: Source, src: str) -> Array:
    """Parallel branches, or the one convolution that they are folded into; (O,)."""
    if source.has(f"{src}.reparam_conv.weight"):
        return _conv(source, f"{src}.reparam_conv")
    if source.has(f"{src}.pos_enc.weight"):
        out = _conv(source, f"{src}.pos_enc")
        return out + _input(len(out))
    if source.has(f"{src}.layer_scale.gamma"):  # a RepMixer
        change = kernel(source, f"{src}.mixer") - _norm(source, f"{src}.norm.identity")
        return _input(len(change)) + _scaled(source, f"{src}.layer_scale", change)
    parts = [conv_norm(source, f"{src}.{b}") for b in BRANCHES if _has_conv(source, f"{src}.{b}")]
    if source.has(f"{src}.identity.weight"):
        parts.append(_norm(source, f"{src}.identity"))
    return np.sum(parts, axis=0)


def conv_norm(source: Source, src: str) -> Array:
    """A convolution and its BatchNorm, (O,)."""
    return _norm(source, f"{src}.bn", _conv(source, f"{src}.conv"))


def up(source: Source, block: str) -> Array:
    """The first half of a block's ConvFFN, (hidden,)."""
    return _linear(source, f"{block}.mlp.fc1", conv_norm(source, f"{block}.mlp.conv"))


def down(source: Source, block: str) -> Array:
    """The second half, with the layer scale; (C,)."""
    second = "_2" if source.has(f"{block}.layer_scale_2.gamma") else ""
    return _scaled(source, f"{block}.layer_scale{second}", _linear(source, f"{block}.mlp.fc2"))


def attention_in(source: Source, block: str) -> Array:
    """BatchNorm, queries, keys and values, (3C,)."""
    return _linear(source, f"{block}.token_mixer.qkv", _norm(source, f"{block}.norm"))


def attention_out(source: Source, block: str) -> Array:
    """Projection and layer scale, (C,)."""
    out = _linear(source, f"{block}.token_mixer.proj")
    return _scaled(source, f"{block}.layer_scale_1", out)


# The name of one tensor that such a module has when unfolded, and what runs it.
MODULES: tuple[tuple[str, Module], ...] = (
    (r"(.+)\.reparam_conv\.weight", kernel),
    (r"(.+)\.mlp\.conv\.conv\.weight", up),
    (r"(.+)\.layer_scale(?:_2)?\.gamma", down),
    (r"(.+)\.norm\.running_var", attention_in),
    (r"(.+)\.layer_scale_1\.gamma", attention_out),
    (r"(.+\.backbone\.\d)\.bn\.weight", conv_norm),
)


def _inputs(channels: int) -> Array:
    """What every convolution sees, (C, WINDOW, WINDOW); the same at each call."""
    return np.random.default_rng(channels).standard_normal((channels, WINDOW, WINDOW))


def _input(channels: int) -> Array:
    """What lies in the middle of it, (C,)."""
    return _inputs(channels)[:, WINDOW // 2, WINDOW // 2]


def _values(source: Source, name: str) -> Array:
    return np.array(source.find(name).astype(mx.float32)).astype(np.float64)


def _bias(source: Source, src: str) -> Array | float:
    return _values(source, f"{src}.bias") if source.has(f"{src}.bias") else 0.0


def _has_conv(source: Source, src: str) -> bool:
    return source.has(f"{src}.conv.weight")


def _conv(source: Source, src: str) -> Array:
    """A convolution at one position, depthwise or dense."""
    weight = _values(source, f"{src}.weight")
    depthwise = weight.shape[1] == 1
    window = _inputs(weight.shape[not depthwise])
    for axis, size in enumerate(weight.shape[2:], 1):  # the middle of it
        window = window.take(range((WINDOW - size) // 2, (WINDOW + size) // 2), axis)
    terms = "oihw,ohw->o" if depthwise else "oihw,ihw->o"
    return np.einsum(terms, weight, window) + _bias(source, src)


def _linear(source: Source, src: str, x: Array | None = None) -> Array:
    """A matrix, which may be stored as a convolution of 1x1."""
    weight = _values(source, f"{src}.weight")
    weight = weight.reshape(len(weight), -1)
    return weight @ (_input(weight.shape[1]) if x is None else x) + _bias(source, src)


def _norm(source: Source, src: str, x: Array | None = None) -> Array:
    """A BatchNorm with fixed statistics."""
    names = ("weight", "bias", "running_mean", "running_var")
    gain, shift, mean, variance = (_values(source, f"{src}.{name}") for name in names)
    x = _input(len(gain)) if x is None else x
    return (x - mean) / np.sqrt(variance + BATCH_NORM_EPS) * gain + shift


def _scaled(source: Source, src: str, x: Array) -> Array:
    """Times a layer scale, which layouts store in different shapes."""
    return _values(source, f"{src}.gamma").reshape(-1) * x
