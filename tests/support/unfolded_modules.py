"""Modules that are folded when a checkpoint is read, computed unfolded in NumPy float64.

Each module is affine, so that its output for one random input identifies it. Branches, BatchNorms
and layer scales are computed one after another, without folding. A module takes its tensors from
the source by their common names.

Formulas: MobileOne (arXiv:2206.04040), section 3.2; FastViT (arXiv:2303.14189), section 3.2.
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_mobileclip.checkpoints.reparameterize import BATCH_NORM_EPS
from mlx_mobileclip.checkpoints.source import Tensors

Array = NDArray[np.float64]
WINDOW = 11  # side of the random inputs, that of the largest kernel
BRANCHES = (  # MobileOne allows several conv_kxk; FastViT and MobileCLIP have one
    *("conv_scale", "large_conv", "small_conv"),
    *(f"conv_kxk.{i}" for i in range(4)),
)


class NamedTensors:
    """Tensors of a checkpoint by common names, each taken once."""

    def __init__(self, tensors: Tensors, key: Callable[[str], str] = str, nhwc: bool = False):
        """Wrap the tensors, which are consumed; `key` maps a common name to the checkpoint's."""
        self._tensors, self.key, self._nhwc = tensors, key, nhwc

    def has(self, name: str) -> bool:
        return self.key(name) in self._tensors

    def take(self, name: str) -> mx.array:
        """Remove and return a tensor, convolutions in (O, I, H, W) order."""
        tensor = self._tensors.pop(self.key(name))
        return tensor.transpose(0, 3, 1, 2) if self._nhwc and tensor.ndim == 4 else tensor

    def remaining(self) -> list[str]:
        """Names of the tensors not taken yet, as in the checkpoint."""
        return list(self._tensors)


Module = Callable[[NamedTensors, str], Array]


def kernel(source: NamedTensors, src: str) -> Array:
    """Parallel branches, or the convolution that they are fused into, (O,)."""
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


def conv_norm(source: NamedTensors, src: str) -> Array:
    """A convolution and its BatchNorm, (O,)."""
    return _norm(source, f"{src}.bn", _conv(source, f"{src}.conv"))


def up(source: NamedTensors, block: str) -> Array:
    """Depthwise convolution and first linear layer of a block's ConvFFN, (hidden,)."""
    return _linear(source, f"{block}.mlp.fc1", conv_norm(source, f"{block}.mlp.conv"))


def down(source: NamedTensors, block: str) -> Array:
    """Second linear layer of a block's ConvFFN and its layer scale, (C,)."""
    second = "_2" if source.has(f"{block}.layer_scale_2.gamma") else ""
    return _scaled(source, f"{block}.layer_scale{second}", _linear(source, f"{block}.mlp.fc2"))


def attention_in(source: NamedTensors, block: str) -> Array:
    """BatchNorm of an attention and its queries, keys and values, (3C,)."""
    return _linear(source, f"{block}.token_mixer.qkv", _norm(source, f"{block}.norm"))


def attention_out(source: NamedTensors, block: str) -> Array:
    """Projection of an attention and its layer scale, (C,)."""
    out = _linear(source, f"{block}.token_mixer.proj")
    return _scaled(source, f"{block}.layer_scale_1", out)


# Pattern of a tensor's name that identifies an unfolded module, and the function that runs it.
MODULES: tuple[tuple[str, Module], ...] = (
    (r"(.+)\.reparam_conv\.weight", kernel),
    (r"(.+)\.mlp\.conv\.conv\.weight", up),
    (r"(.+)\.layer_scale(?:_2)?\.gamma", down),
    (r"(.+)\.norm\.running_var", attention_in),
    (r"(.+)\.layer_scale_1\.gamma", attention_out),
    (r"(.+\.backbone\.\d)\.bn\.weight", conv_norm),
)


def _inputs(channels: int) -> Array:
    """Random input of a convolution, (C, WINDOW, WINDOW); the same at each call."""
    return np.random.default_rng(channels).standard_normal((channels, WINDOW, WINDOW))


def _input(channels: int) -> Array:
    """Input of a pointwise module: the centre of the window, (C,)."""
    return _inputs(channels)[:, WINDOW // 2, WINDOW // 2]


def _values(source: NamedTensors, name: str) -> Array:
    return np.array(source.take(name).astype(mx.float32)).astype(np.float64)


def _bias(source: NamedTensors, src: str) -> Array | float:
    return _values(source, f"{src}.bias") if source.has(f"{src}.bias") else 0.0


def _has_conv(source: NamedTensors, src: str) -> bool:
    return source.has(f"{src}.conv.weight")


def _conv(source: NamedTensors, src: str) -> Array:
    """A depthwise or dense convolution at one position."""
    weight = _values(source, f"{src}.weight")
    depthwise = weight.shape[1] == 1
    window = _inputs(weight.shape[not depthwise])
    for axis, size in enumerate(weight.shape[2:], 1):  # the centre of the window
        window = window.take(range((WINDOW - size) // 2, (WINDOW + size) // 2), axis)
    terms = "oihw,ohw->o" if depthwise else "oihw,ihw->o"
    return np.einsum(terms, weight, window) + _bias(source, src)


def _linear(source: NamedTensors, src: str, x: Array | None = None) -> Array:
    """A linear layer, which may be stored as a 1x1 convolution."""
    weight = _values(source, f"{src}.weight")
    weight = weight.reshape(len(weight), -1)
    return weight @ (_input(weight.shape[1]) if x is None else x) + _bias(source, src)


def _norm(source: NamedTensors, src: str, x: Array | None = None) -> Array:
    """A BatchNorm with fixed statistics."""
    names = ("weight", "bias", "running_mean", "running_var")
    gain, shift, mean, variance = (_values(source, f"{src}.{name}") for name in names)
    x = _input(len(gain)) if x is None else x
    return (x - mean) / np.sqrt(variance + BATCH_NORM_EPS) * gain + shift


def _scaled(source: NamedTensors, src: str, x: Array) -> Array:
    """Multiply by a layer scale, whose shape depends on the layout."""
    return _values(source, f"{src}.gamma").reshape(-1) * x
