"""Match the layers of a program with the tower in the config, and read its weights.

Layers are compared one by one, and their weights get the common names (timm's and open_clip's) of
a checkpoint with fused branches. Core ML's converter also folds BatchNorm into the convolution
before it, which then has a bias, and layer scale into the second layer of the ConvFFN, so that the
scale becomes 1.
"""

import warnings
from pathlib import Path

import mlx.core as mx
import numpy as np

from ...errors import CheckpointError, name_some
from ...models.fastvit import (
    LAYER_NORM_EPS,
    SE_RATIO_DOWNSAMPLE,
    SE_RATIO_FINAL,
    FastViTConfig,
)
from ...models.text import EPS as TEXT_EPS
from ...models.text import KERNEL_SIZE, TextConfig
from ...models.vit import STEM_SIZES, ViTConfig
from ..reparameterize import BATCH_NORM_EPS
from .constants import Array, Constant
from .layers import Layer, layers_of, without_leading_ones
from .program import read_program

Tensors = dict[str, mx.array]
MASKED = -1e4  # scores up to this become 0 in the softmax
EPS_TOLERANCE = 0.1  # float16 holds 1e-5 as 1.0014e-5


def read_image_tower(
    path: Path, where: str, config: FastViTConfig | ViTConfig, embed_dim: int | None = None
) -> Tensors:
    """Read the tensors of an image tower from a package, under common names.

    Args:
        path: The .mlpackage directory.
        where: Its name in messages.
        config: Expected tower.
        embed_dim: Width of the final projection; None if there is none.

    Raises:
        CheckpointError: the package is damaged, or is of another tower.
    """
    chain = _Chain(path, where)
    if isinstance(config, ViTConfig):
        _vit(chain, config)
    else:
        _fastvit(chain, config)
    if embed_dim is not None:
        head = "head" if isinstance(config, ViTConfig) else "head.fc"
        chain.linear(head, (embed_dim, config.features))
    return chain.finish()


def read_text_tower(path: Path, where: str, config: TextConfig, embed_dim: int) -> Tensors:
    """Read the tensors of a text tower from a package; see `read_image_tower`."""
    chain = _Chain(path, where)
    D, rows = config.width, config.context_length
    chain.constant("gather", "token_embedding.weight", (config.vocab_size, D))
    chain.constant("add", "positional_embedding", (rows, D))
    count = config.layers + 2 * config.rep_mixers
    for i in range(count):
        name = f"transformer.resblocks.{i}"
        if config.rep_mixers and i in (0, count - 1):
            _text_mixer(chain, name, D)
            continue
        parts = ("ln_1", "attn.in_proj", "attn.out_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
        _transformer_layer(chain, name, parts, D, TEXT_EPS, rows if config.causal else None)
    chain.layer_norm("ln_final", D, TEXT_EPS)
    chain.linear("projection", (embed_dim, D), bias=False)
    tensors = chain.finish()
    tensors["text_projection"] = tensors.pop("projection.weight").T
    return tensors


class _Chain:
    """The layers of a package, each taken once, in order."""

    def __init__(self, path: Path, where: str):
        program = read_program(path, where)
        self.where = where
        self.tensors: dict[str, Array] = {}
        self._layers, unused = layers_of(program)
        self._taken = 0
        if unused:
            warnings.warn(
                f"{where}: nothing uses {name_some(unused)}; not read as weights", stacklevel=2
            )

    def next(self, kind: str, *others: str) -> Layer:
        """Take the next layer, which must be of one of these kinds."""
        if self._taken == len(self._layers):
            raise CheckpointError(
                f"{self.where}: ends after {self._taken} layers, before the {kind} of the tower"
            )
        layer = self._layers[self._taken]
        if layer.kind not in (kind, *others):
            raise self.error(layer, f"is where the tower has {kind}")
        self._taken += 1
        return layer

    def error(self, layer: Layer, what: str) -> CheckpointError:
        """The error for a layer that does not match the config."""
        return CheckpointError(
            f"{self.where}: {layer.description} {what} (layer {self._taken}); it is another "
            "model, or was exported in an unknown way"
        )

    def weight(self, layer: Layer, parameter: str) -> Constant:
        """Get a weight that the layer must have."""
        constant = layer.weights.get(parameter)
        if constant is None:
            raise self.error(layer, f"has no constant array as its {parameter}")
        return constant

    def put(self, layer: Layer, name: str, parameter: str, shape: tuple[int, ...]) -> None:
        """Store a weight that must have this shape."""
        constant = self.weight(layer, parameter)
        if constant.type.shape != shape:
            raise self.error(
                layer, f"has a weight of shape {constant.type.shape} instead of {shape} for {name}"
            )
        self.tensors[name] = constant.read()

    def activation(self, kind: str) -> None:
        """Take an activation; GELU must be the exact one."""
        layer = self.next(kind)
        if kind == "gelu" and layer.text("mode") not in ("EXACT", ""):
            raise self.error(layer, f"is {layer.text('mode')[:40]}, not the exact GELU")

    def conv(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        stride: int = 1,
        groups: int = 1,
        padding: int | None = None,
    ) -> None:
        """Take a convolution: weight (O, I, H, W) and bias; by default with "same" padding."""
        layer = self.next("conv")
        sides = [side // 2 if padding is None else padding for side in shape[2:]]
        expected = tuple(side for side in sides for _ in range(2))
        if layer.integers("strides") != (stride, stride) or _padding(layer, shape) != expected:
            raise self.error(
                layer,
                f"has strides {layer.integers('strides')} and padding {_padding(layer, shape)} "
                f"instead of {(stride, stride)} and {expected}",
            )
        if layer.integers("groups") != (groups,) or set(layer.integers("dilations")) != {1}:
            raise self.error(layer, f"has other groups than {groups}, or dilations")
        self._weight_and_bias(layer, name, shape)

    def linear(self, name: str, shape: tuple[int, int], *, bias: bool = True) -> None:
        """Take a linear layer: weight (O, I) and bias; without `bias`, zeros are accepted."""
        layer = self.next("linear", "matmul")
        if layer.kind == "linear":
            self._weight_and_bias(layer, name, shape, keep_bias=bias)
            return
        outputs, inputs = shape
        transposed = bool(sum(layer.integers("transpose_y")))
        stored = (outputs, inputs) if transposed else (inputs, outputs)
        self.put(layer, f"{name}.weight", "y", stored)
        if not transposed:
            self.tensors[f"{name}.weight"] = self.tensors[f"{name}.weight"].T
        if bias:
            self.tensors[f"{name}.bias"] = np.zeros(outputs, np.float32)

    def layer_norm(self, name: str, size: int, eps: float) -> None:
        """Take a LayerNorm over the channels, which may be split into single operations.

        Its last step is then a BatchNorm that only scales and shifts, fused by Core ML's
        converter from a product and a sum; its epsilon has no meaning.
        """
        layer = self.next("layer_norm", "batch_norm")
        if layer.kind == "layer_norm":
            self._check_eps(layer, eps)
        else:
            self.put(layer, "mean", "mean", (size,))
            self.put(layer, "variance", "variance", (size,))
            mean, variance = self.tensors.pop("mean"), self.tensors.pop("variance")
            neutral = not mean.any() and bool((variance == 1).all())
            if layer.input_kind not in ("real_div", "mul") or not neutral:
                raise self.error(layer, "is where the tower has a LayerNorm")
        self.put(layer, f"{name}.weight", "gamma", (size,))
        self.put(layer, f"{name}.bias", "beta", (size,))

    def batch_norm(self, name: str, size: int) -> None:
        """Take a BatchNorm that is not folded."""
        layer = self.next("batch_norm")
        self._check_eps(layer, BATCH_NORM_EPS)
        names = {"gamma": "weight", "beta": "bias", "mean": "running_mean"}
        for parameter, common in {**names, "variance": "running_var"}.items():
            self.put(layer, f"{name}.{common}", parameter, (size,))

    def constant(self, kind: str, name: str, shape: tuple[int, ...]) -> Array:
        """Take the array of a lookup, an addition, a product or a concatenation."""
        layer = self.next(kind)
        weights = list(layer.weights.values())
        if len(weights) != 1:
            raise self.error(layer, "takes more than one array of weights")
        actual = without_leading_ones(weights[0].type.shape)
        if actual != shape:
            raise self.error(layer, f"has the shape {actual} instead of {shape} for {name}")
        self.tensors[name] = weights[0].read().reshape(shape)
        return self.tensors[name]

    def mask(self, length: int) -> None:
        """Take a causal mask, which has no weights."""
        self.constant("add", "mask", (length, length))
        mask = self.tensors.pop("mask")
        above = np.triu(np.ones(mask.shape, bool), 1)
        if (mask[above] > MASKED).any() or mask[~above].any():
            raise self.error(self._layers[self._taken - 1], "does not add a causal mask")

    def finish(self) -> Tensors:
        """Return the tensors; raises CheckpointError if layers are left."""
        if self._taken < len(self._layers):
            raise self.error(self._layers[self._taken], "continues after the end of the tower")
        return {name: mx.array(np.ascontiguousarray(a)) for name, a in self.tensors.items()}

    def _weight_and_bias(
        self, layer: Layer, name: str, shape: tuple[int, ...], *, keep_bias: bool = True
    ) -> None:
        # PyTorch's fused attention names its weight in_proj_weight.
        stem = f"{name}_" if name.endswith("in_proj") else f"{name}."
        self.put(layer, f"{stem}weight", "weight", shape)
        if "bias" not in layer.weights and keep_bias:
            self.tensors[f"{stem}bias"] = np.zeros(shape[0], np.float32)
        elif "bias" in layer.weights:
            self.put(layer, f"{stem}bias", "bias", shape[:1])
            if not keep_bias and self.tensors.pop(f"{stem}bias").any():
                raise self.error(layer, f"has a bias, unlike {name}")

    def _check_eps(self, layer: Layer, eps: float) -> None:
        stated = layer.number("epsilon")
        if not abs(stated - eps) <= EPS_TOLERANCE * eps:  # also if it is NaN
            raise self.error(layer, f"has the epsilon {stated:.3g} instead of {eps}")


def _padding(layer: Layer, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Padding above, below, left and right; empty if it depends on the input size."""
    kind = layer.text("pad_type")
    if kind == "custom":
        return layer.integers("pad")
    if kind == "valid":
        return (0, 0, 0, 0)
    if layer.integers("strides") == (1, 1):  # "same"
        return tuple(side // 2 for side in shape[2:] for _ in range(2))
    return ()


def _fastvit(chain: _Chain, config: FastViTConfig) -> None:
    C = config.embed_dims[0]
    for i, (shape, stride) in enumerate((((C, 3, 3, 3), 2), ((C, 1, 3, 3), 2), ((C, C, 1, 1), 1))):
        groups = C if i == 1 else 1
        chain.conv(f"stem.{i}.reparam_conv", shape, stride=stride, groups=groups)
        chain.activation("gelu")
    for i, C in enumerate(config.embed_dims):
        stage = f"stages.{i}"
        if i:
            name = f"{stage}.downsample.proj"
            chain.conv(f"{name}.0.reparam_conv", (C, 1, 7, 7), stride=2, groups=C // 2)
            if config.se_downsamples[i]:
                _squeeze_excite(chain, f"{name}.0.se", C, C // SE_RATIO_DOWNSAMPLE)
            chain.activation("gelu")
            chain.conv(f"{name}.1.reparam_conv", (C, C, 1, 1))
            chain.activation("gelu")
        if config.token_mixers[i] == "attention":
            chain.conv(f"{stage}.pos_emb.reparam_conv", (C, 1, 7, 7), groups=C)
        for j in range(config.layers[i]):
            _block(chain, f"{stage}.blocks.{j}", C, config, i)
    C, wide = config.embed_dims[-1], config.features
    chain.conv("final_conv.reparam_conv", (wide, 1, 3, 3), groups=C)
    _squeeze_excite(chain, "final_conv.se", wide, wide // SE_RATIO_FINAL)
    chain.activation("gelu")


def _squeeze_excite(chain: _Chain, name: str, channels: int, hidden: int) -> None:
    chain.conv(f"{name}.fc1", (hidden, channels, 1, 1))
    chain.activation("relu")
    chain.conv(f"{name}.fc2", (channels, hidden, 1, 1))
    chain.activation("sigmoid")


def _block(chain: _Chain, name: str, C: int, config: FastViTConfig, stage: int) -> None:
    scale = "layer_scale"
    if config.token_mixers[stage] == "attention":
        if config.attention_norm == "layer":
            chain.layer_norm(f"{name}.norm", C, LAYER_NORM_EPS)
        else:
            chain.batch_norm(f"{name}.norm", C)
        chain.linear(f"{name}.token_mixer.qkv", (3 * C, C), bias=False)
        chain.activation("softmax")
        chain.linear(f"{name}.token_mixer.proj", (C, C))
        chain.constant("mul", f"{name}.layer_scale_1.gamma", (C, 1, 1))
        scale = "layer_scale_2"
    else:
        chain.conv(f"{name}.token_mixer.reparam_conv", (C, 1, 3, 3), groups=C)
    _conv_ffn(chain, f"{name}.mlp", (C, 1, 7, 7), int(C * config.mlp_ratios[stage]))
    chain.tensors[f"{name}.{scale}.gamma"] = np.ones((C, 1, 1), np.float32)


def _conv_ffn(chain: _Chain, name: str, shape: tuple[int, ...], hidden: int) -> None:
    C = shape[0]
    chain.conv(f"{name}.conv.conv", shape, groups=C)
    chain.conv(f"{name}.fc1", (hidden, C, 1, 1))
    chain.activation("gelu")
    chain.conv(f"{name}.fc2", (C, hidden, 1, 1))


def _text_mixer(chain: _Chain, name: str, C: int) -> None:
    shape = (C, 1, 1, KERNEL_SIZE)
    chain.conv(f"{name}.token_mixer.reparam_conv", shape, groups=C)
    _conv_ffn(chain, f"{name}.mlp", shape, 4 * C)
    chain.tensors[f"{name}.layer_scale.gamma"] = np.ones((C, 1, 1), np.float32)


def _vit(chain: _Chain, config: ViTConfig) -> None:
    D = config.width
    if config.stem != "convolutional":
        raise CheckpointError(f"{chain.where}: this tower is not supported in Core ML packages")
    widths = (3, config.stem_width, config.stem_width, D)
    for i, size in enumerate(STEM_SIZES):
        if i:
            chain.activation("gelu")
        shape, padding = (widths[i + 1], widths[i], size, size), 0 if i else config.stem_padding
        chain.conv(f"patch_embed.backbone.{i}.conv", shape, stride=size, padding=padding)
    positions = chain.constant("add", "pos_embed", (config.patches, D))
    first = chain.constant("concat", "cls_token", (D,))
    chain.tensors |= {"pos_embed": positions[None], "cls_token": first[None, None]}
    parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for i in range(config.layers):
        _transformer_layer(chain, f"blocks.{i}", parts, D, config.eps, None)
    chain.layer_norm("norm", D, config.eps)


def _transformer_layer(
    chain: _Chain, name: str, parts: tuple[str, ...], D: int, eps: float, masked: int | None
) -> None:
    """Take a layer of `transformer.py`; `masked` is the context length if it is causal."""
    norm1, qkv, proj, norm2, fc1, fc2 = (f"{name}.{part}" for part in parts)
    chain.layer_norm(norm1, D, eps)
    chain.linear(qkv, (3 * D, D))
    if masked is not None:
        chain.mask(masked)
    chain.activation("softmax")
    chain.linear(proj, (D, D))
    chain.layer_norm(norm2, D, eps)
    chain.linear(fc1, (4 * D, D))
    chain.activation("gelu")
    chain.linear(fc2, (D, 4 * D))
