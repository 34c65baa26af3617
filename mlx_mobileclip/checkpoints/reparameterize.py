"""Fold towers into inference form: parallel branches, BatchNorm, layer scale, biases.

All arithmetic is float64 and lazy. MLX has float64 only on the CPU, so each operation gets the
CPU as its stream: `with mx.stream(mx.cpu)` would change the default device of all threads. Source
names are timm's. Modules may be fused or have several branches. A convolution with a bias has its
BatchNorm already folded in, as in Core ML packages.

Formulas: MobileOne (arXiv:2206.04040), section 3.2; FastViT (arXiv:2303.14189), section 3.2;
reference code: apple/ml-fastvlm 592b4ad `mobileclip/mci.py` `reparameterize` methods.
"""

from functools import partial

import mlx.core as mx

from ..models.fastvit import SE_RATIO_DOWNSAMPLE, SE_RATIO_FINAL, FastViTConfig
from ..models.text import KERNEL_SIZE as TEXT_KERNEL_SIZE
from .source import Source

BATCH_NORM_EPS = 1e-5

Affine = tuple[mx.array, mx.array]

add, subtract, multiply, divide, sqrt, sum_of, reshape, transpose = (
    partial(operation, stream=mx.cpu)
    for operation in (
        mx.add, mx.subtract, mx.multiply, mx.divide, mx.sqrt, mx.sum, mx.reshape, mx.transpose,
    )
)  # fmt: skip


def fold_fastvit(source: Source, config: FastViTConfig, path: str = "") -> dict[str, mx.array]:
    """Canonical float32 tensors of a tower.

    Args:
        source: Where the tensors are taken from.
        config: Shape of the tower.
        path: Common name of the tower, with a trailing dot; empty for a bare trunk.

    Returns:
        Tensors by their names in `FastViT`.
    """
    fold = _FastViT(source, config)
    fold.stem(f"{path}stem")
    for i, channels in enumerate(config.embed_dims):
        stage = f"{path}stages.{i}"
        if i:
            fold.downsample(f"{stage}.downsample", f"stages.{i}.downsample", channels // 2, i)
        if config.token_mixers[i] == "attention":
            fold.position_encoding(f"{stage}.pos_emb", f"stages.{i}.pos_emb", channels)
        for j in range(config.layers[i]):
            fold.block(f"{stage}.blocks.{j}", f"stages.{i}.blocks.{j}", channels, i)
    fold.final_conv(f"{path}final_conv", config.embed_dims[-1])
    return {name: _float32(tensor) for name, tensor in fold.tensors.items()}


def fold_text_block(source: Source, src: str, channels: int) -> dict[str, mx.array]:
    """Canonical float32 tensors of a RepMixer block along text.

    Args:
        source: Where the tensors are taken from.
        src: Common name of the block.
        channels: Its width.

    Returns:
        Tensors by their names in `RepMixerBlock`.
    """
    fold, shape = _Fold(source), (channels, 1, 1, TEXT_KERNEL_SIZE)
    # No "scale" branch: MobileOne has none for kernels of height 1.
    weight, bias = fold.rep_mixer(f"{src}.token_mixer", shape, scale=False)
    fold.tensors["mixer.weight"], fold.tensors["bias"] = _along_text(weight), bias
    gamma = source.scale(f"{src}.layer_scale.gamma", channels)
    weight = fold.conv_ffn(f"{src}.mlp", "", shape, 4 * channels, gamma)
    fold.tensors["conv.weight"] = _along_text(weight)
    return {name: _float32(tensor) for name, tensor in fold.tensors.items()}


def fold_conv_norm(
    source: Source, conv: str, norm: str | None, shape: tuple[int, ...]
) -> tuple[mx.array, mx.array]:
    """Fold a BatchNorm into a convolution: float32 weight (O, H, W, I) and bias.

    Args:
        source: Where the tensors are taken from.
        conv: Common name of the convolution.
        norm: Common name of the BatchNorm after it; None if there is none.
        shape: Shape of the weight, (O, I, H, W).
    """
    weight = source.conv(f"{conv}.weight", shape)
    if norm is None or source.has(f"{conv}.bias"):
        bias = source.vector(f"{conv}.bias", shape[0])
    else:
        gain, bias = _Fold(source).batch_norm(norm, shape[0])
        weight = _scaled(weight, gain)
    return _float32(_ohwi(weight)), _float32(bias)


class _Fold:
    """Folds modules: methods read a module at `src` and return it or store it at `dst`."""

    def __init__(self, source: Source):
        self.source = source
        self.tensors: dict[str, mx.array] = {}

    # Weight and bias of one affine map.

    def batch_norm(self, src: str, channels: int) -> Affine:
        """Scale and shift of a BatchNorm in inference mode."""
        gamma, beta, mean, variance = (
            self.source.vector(f"{src}.{name}", channels)
            for name in ("weight", "bias", "running_mean", "running_var")
        )
        scale = divide(gamma, sqrt(add(variance, BATCH_NORM_EPS)))
        return scale, subtract(beta, multiply(mean, scale))

    def _conv_norm(self, src: str, shape: tuple[int, ...]) -> Affine:
        weight = self.source.conv(f"{src}.conv.weight", shape)
        if self.source.has(f"{src}.conv.bias"):
            return weight, self.source.vector(f"{src}.conv.bias", shape[0])
        scale, shift = self.batch_norm(f"{src}.bn", shape[0])
        return _scaled(weight, scale), shift

    def _mobile_one(
        self, src: str, shape: tuple[int, ...], *, scale: bool, identity: bool
    ) -> Affine:
        """A MobileOne block: k x k, 1x1 "scale" and identity branches in one kernel."""
        if self.source.has(f"{src}.reparam_conv.weight"):
            weight = self.source.conv(f"{src}.reparam_conv.weight", shape)
            return weight, self.source.vector(f"{src}.reparam_conv.bias", shape[0])
        weight, bias = self._conv_norm(f"{src}.conv_kxk.0", shape)
        branch = 1
        while self.source.has(f"{src}.conv_kxk.{branch}.conv.weight"):
            w, b = self._conv_norm(f"{src}.conv_kxk.{branch}", shape)
            weight, bias, branch = add(weight, w), add(bias, b), branch + 1
        if scale:
            w, b = self._conv_norm(f"{src}.conv_scale", (*shape[:2], 1, 1))
            weight, bias = add(weight, _centred(w, shape)), add(bias, b)
        if identity:
            gain, shift = self.batch_norm(f"{src}.identity", shape[0])
            weight = add(weight, _scaled(_identity(shape), gain))
            bias = add(bias, shift)
        return weight, bias

    def _linear(self, src: str, outputs: int, inputs: int) -> Affine:
        """A 1x1 convolution with bias, as a matrix."""
        weight = self.source.conv(f"{src}.weight", (outputs, inputs, 1, 1))
        return _matrix(weight), self.source.vector(f"{src}.bias", outputs)

    # Storing the result.

    def _put(self, dst: str, affine: Affine) -> None:
        self.tensors[f"{dst}.weight"], self.tensors[f"{dst}.bias"] = affine

    def _put_double(self, dst: str, weight: mx.array, bias: mx.array) -> None:
        weight = _ohwi(weight)
        for i, half in enumerate(("even", "odd")):
            rows = mx.arange(i, len(weight), 2, stream=mx.cpu)
            self.tensors[f"{dst}.{half}.weight"] = mx.take(weight, rows, axis=0, stream=mx.cpu)
        self.tensors[f"{dst}.bias"] = bias

    def _squeeze_excite(self, src: str, dst: str, channels: int, hidden: int) -> None:
        self._put(f"{dst}.fc1", self._linear(f"{src}.fc1", hidden, channels))
        self._put(f"{dst}.fc2", self._linear(f"{src}.fc2", channels, hidden))

    # Modules of both image and text towers.

    def rep_mixer(self, src: str, shape: tuple[int, ...], *, scale: bool) -> Affine:
        """Mixer, norm and residual, y = x + gamma * (mixer(x) - norm(x)), in one kernel."""
        channels = shape[0]
        if self.source.has(f"{src}.reparam_conv.weight"):
            weight = self.source.conv(f"{src}.reparam_conv.weight", shape)
            return weight, self.source.vector(f"{src}.reparam_conv.bias", channels)
        weight, bias = self._mobile_one(f"{src}.mixer", shape, scale=scale, identity=True)
        gain, shift = self.batch_norm(f"{src}.norm.identity", channels)
        gamma = self.source.scale(f"{src}.layer_scale.gamma", channels)
        one = _identity(shape)
        change = subtract(weight, _scaled(one, gain))
        weight = add(one, _scaled(change, gamma))
        return weight, multiply(gamma, subtract(bias, shift))

    def conv_ffn(
        self, src: str, dst: str, shape: tuple[int, ...], hidden: int, gamma: mx.array
    ) -> mx.array:
        """Store fc1 and fc2 with the prefix `dst`; returns the depthwise kernel."""
        channels = shape[0]
        kernel, shift = self._conv_norm(f"{src}.conv", shape)
        weight, bias = self._linear(f"{src}.fc1", hidden, channels)
        self._put(f"{dst}fc1", (weight, add(bias, sum_of(multiply(weight, shift), axis=1))))
        weight, bias = self._linear(f"{src}.fc2", channels, hidden)
        self._put(f"{dst}fc2", (_scaled(weight, gamma), multiply(bias, gamma)))
        return kernel


class _FastViT(_Fold):
    """The modules of one image tower."""

    def __init__(self, source: Source, config: FastViTConfig):
        super().__init__(source)
        self.config = config

    def stem(self, src: str) -> None:
        C = self.config.embed_dims[0]
        # MCi0 to MCi2 have "scale" branches here, MCi3 and MCi4 do not.
        has_scale = [self.source.has(f"{src}.{i}.conv_scale.conv.weight") for i in range(2)]
        weight, bias = self._mobile_one(
            f"{src}.0", (C, 3, 3, 3), scale=has_scale[0], identity=False
        )
        self.tensors["stem.conv.weight"], self.tensors["stem.conv_bias"] = _ohwi(weight), bias
        weight, bias = self._mobile_one(
            f"{src}.1", (C, 1, 3, 3), scale=has_scale[1], identity=False
        )
        self.tensors["stem.depthwise.weight"] = _ohwi(weight)
        self.tensors["stem.depthwise_bias"] = bias
        weight, bias = self._mobile_one(f"{src}.2", (C, C, 1, 1), scale=False, identity=True)
        self._put("stem.pointwise", (_matrix(weight), bias))

    def downsample(self, src: str, dst: str, channels: int, stage: int) -> None:
        wide, large = 2 * channels, f"{src}.proj.0"
        shape = (wide, 1, 7, 7)
        if self.source.has(f"{large}.reparam_conv.weight"):
            weight = self.source.conv(f"{large}.reparam_conv.weight", shape)
            bias = self.source.vector(f"{large}.reparam_conv.bias", wide)
        else:
            weight, bias = self._conv_norm(f"{large}.large_conv", shape)
            w, b = self._conv_norm(f"{large}.small_conv", (wide, 1, 3, 3))
            weight, bias = add(weight, _centred(w, shape)), add(bias, b)
        self._put_double(f"{dst}.depthwise", weight, bias)
        if self.config.se_downsamples[stage]:
            self._squeeze_excite(f"{large}.se", f"{dst}.se", wide, wide // SE_RATIO_DOWNSAMPLE)
        weight, bias = self._mobile_one(
            f"{src}.proj.1", (wide, wide, 1, 1), scale=False, identity=True
        )
        self._put(f"{dst}.pointwise", (_matrix(weight), bias))

    def position_encoding(self, src: str, dst: str, channels: int) -> None:
        shape = (channels, 1, 7, 7)
        if self.source.has(f"{src}.reparam_conv.weight"):
            weight = self.source.conv(f"{src}.reparam_conv.weight", shape)
            bias = self.source.vector(f"{src}.reparam_conv.bias", channels)
        else:
            weight = add(self.source.conv(f"{src}.pos_enc.weight", shape), _identity(shape))
            bias = self.source.vector(f"{src}.pos_enc.bias", channels)
        self.tensors[f"{dst}.conv.weight"], self.tensors[f"{dst}.bias"] = _ohwi(weight), bias

    def block(self, src: str, dst: str, channels: int, stage: int) -> None:
        attention = self.config.token_mixers[stage] == "attention"
        if attention:
            self._attention(src, dst, channels)
        else:
            weight, bias = self.rep_mixer(f"{src}.token_mixer", (channels, 1, 3, 3), scale=True)
            self.tensors[f"{dst}.token_mixer.conv.weight"] = _ohwi(weight)
            self.tensors[f"{dst}.token_mixer.bias"] = bias
        gamma = self.source.scale(f"{src}.layer_scale{'_2' if attention else ''}.gamma", channels)
        hidden = int(channels * self.config.mlp_ratios[stage])
        kernel = self.conv_ffn(f"{src}.mlp", f"{dst}.mlp.", (channels, 1, 7, 7), hidden, gamma)
        self.tensors[f"{dst}.mlp.conv.weight"] = _ohwi(kernel)

    def _attention(self, src: str, dst: str, channels: int) -> None:
        C = channels
        qkv = _float64(self.source.take(f"{src}.token_mixer.qkv.weight", (3 * C, C)))
        if self.config.attention_norm == "layer":
            self._put(
                f"{dst}.token_mixer.norm",
                (
                    self.source.vector(f"{src}.norm.weight", C),
                    self.source.vector(f"{src}.norm.bias", C),
                ),
            )
            self.tensors[f"{dst}.token_mixer.qkv.weight"] = qkv
        else:
            gain, shift = self.batch_norm(f"{src}.norm", C)
            bias = sum_of(multiply(qkv, shift), axis=1)
            self._put(f"{dst}.token_mixer.qkv", (multiply(qkv, gain), bias))
        gamma = self.source.scale(f"{src}.layer_scale_1.gamma", C)
        proj = _float64(self.source.take(f"{src}.token_mixer.proj.weight", (C, C)))
        bias = self.source.vector(f"{src}.token_mixer.proj.bias", C)
        self.tensors[f"{dst}.token_mixer.proj.weight"] = _scaled(proj, gamma)
        self.tensors[f"{dst}.token_mixer.bias"] = multiply(bias, gamma)

    def final_conv(self, src: str, channels: int) -> None:
        wide = 2 * channels
        weight, bias = self._mobile_one(src, (wide, 1, 3, 3), scale=True, identity=False)
        self._put_double("final_conv.depthwise", weight, bias)
        self._squeeze_excite(f"{src}.se", "final_conv.se", wide, wide // SE_RATIO_FINAL)


def _float32(tensor: mx.array) -> mx.array:
    return tensor.astype(mx.float32, stream=mx.cpu)


def _float64(tensor: mx.array) -> mx.array:
    return tensor.astype(mx.float64, stream=mx.cpu)


def _scaled(weight: mx.array, gain: mx.array) -> mx.array:
    """Multiply each output of a weight by its gain."""
    return multiply(weight, reshape(gain, (-1, *(1 for _ in weight.shape[1:]))))


def _matrix(weight: mx.array) -> mx.array:
    """Reshape the weight of a 1x1 convolution, (O, I, 1, 1), to (O, I)."""
    return reshape(weight, weight.shape[:2])


def _along_text(weight: mx.array) -> mx.array:
    """Reshape a depthwise kernel over text positions from (C, 1, 1, K) to (C, K, 1)."""
    return mx.squeeze(_ohwi(weight), axis=1, stream=mx.cpu)


def _ohwi(weight: mx.array) -> mx.array:
    return transpose(weight, (0, 2, 3, 1))


def _centred(weight: mx.array, shape: tuple[int, ...]) -> mx.array:
    """Pad an odd-sized kernel with zeros on all sides to the size in `shape`."""
    margins = [(whole - part) // 2 for whole, part in zip(shape[2:], weight.shape[2:], strict=True)]
    widths = [(0, 0), (0, 0), *((margin, margin) for margin in margins)]
    return mx.pad(weight, widths, stream=mx.cpu)


def _identity(shape: tuple[int, ...]) -> mx.array:
    """The identity kernel: depthwise (C, 1, h, w) or dense (C, C, 1, 1)."""
    outputs, inputs = shape[:2]
    dense = inputs > 1
    centre = mx.eye(outputs, stream=mx.cpu) if dense else mx.ones((outputs, 1), stream=mx.cpu)
    return _centred(reshape(_float64(centre), (*centre.shape, 1, 1)), shape)
