"""FastViT image towers in inference form: MCi0 to MCi4 (MobileCLIP) and FastViTHD (FastVLM).

Parallel branches, BatchNorm, layer scale and each depthwise bias directly before a 1x1 layer are
already folded into the weights. Feature maps are NHWC and every 1x1 convolution is a `Linear`. On a
CPU a feature map may be split into strips (`Rows`); layers that need all positions call `whole`.

Papers: FastViT (arXiv:2303.14189), MobileCLIP (arXiv:2311.17049, section 4), FastVLM
(arXiv:2412.13303, section 3). Reference code: apple/ml-fastvlm 592b4ad
`llava/model/multimodal_encoder/mobileclip/mci.py`; timm 1.0.31 `timm/models/fastvit.py`.
"""

from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..json_fields import Fields
from ..layers import (
    GELU,
    DepthwiseConv,
    DepthwiseConvDouble,
    FeatureMap,
    Linear,
    StemConv,
    add_biases,
    add_product,
    conv_add_biases,
    global_average_pool,
    run,
    self_attention,
    whole,
)

HEAD_DIM = 32
LAYER_NORM_EPS = 1e-5
SE_RATIO_DOWNSAMPLE = 4
SE_RATIO_FINAL = 16


@dataclass(frozen=True, slots=True)
class FastViTConfig:
    """Architecture of a FastViT tower; each tuple has one entry per stage.

    Attributes:
        layers: Blocks in the stage.
        embed_dims: Channels of the stage.
        mlp_ratios: Hidden width of the stage's ConvFFN divided by its channels.
        token_mixers: "repmixer" or "attention".
        se_downsamples: Whether the downsampling before the stage has squeeze-and-excitation.
        attention_norm: "layer" (runs before attention) or "batch" (folded into its qkv layer).
    """

    layers: tuple[int, ...]
    embed_dims: tuple[int, ...]
    mlp_ratios: tuple[float, ...]
    token_mixers: tuple[str, ...]
    se_downsamples: tuple[bool, ...]
    attention_norm: str

    @property
    def stride(self) -> int:
        """Input pixels per output position: 4 in the stem, then 2 per further stage."""
        return 2 ** (len(self.layers) + 1)

    @property
    def features(self) -> int:
        """Channels of the output."""
        return 2 * self.embed_dims[-1]

    def to_json(self) -> dict[str, Any]:
        """Return the `vision_config` of a canonical config.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Fields) -> "FastViTConfig":
        """Read and check a `vision_config`; raises ConfigError naming the field at fault."""
        layers = fields.integers("layers", 1, 64, most=8)
        stages = len(layers)
        config = cls(
            layers=layers,
            embed_dims=fields.integers("embed_dims", 2, 8192, length=stages),
            mlp_ratios=fields.numbers("mlp_ratios", 0.25, 16, length=stages),
            token_mixers=fields.choices("token_mixers", ("repmixer", "attention"), length=stages),
            se_downsamples=fields.booleans("se_downsamples", length=stages),
            attention_norm=fields.choice("attention_norm", ("layer", "batch")),
        )
        if config.features < SE_RATIO_FINAL:
            raise fields.error("embed_dims", f"the last is less than {SE_RATIO_FINAL // 2}")
        for i, (dim, mixer) in enumerate(zip(config.embed_dims, config.token_mixers, strict=True)):
            if mixer == "attention" and dim % HEAD_DIM:
                raise fields.error(f"embed_dims[{i}]", f"{dim} is not a multiple of {HEAD_DIM}")
            if i and dim != 2 * config.embed_dims[i - 1]:
                raise fields.error(f"embed_dims[{i}]", f"{dim} is not twice the previous entry")
        return config


def _mci(layers: tuple[int, ...], width: int, mlp_ratio: float) -> FastViTConfig:
    stages = len(layers)
    large = stages == 5  # MCi3 and MCi4, which also differ in SE and attention norm
    attention = 2 if large else 1
    return FastViTConfig(
        layers=layers,
        embed_dims=tuple(width * 2**i for i in range(stages)),
        mlp_ratios=(float(mlp_ratio),) * stages,
        token_mixers=("repmixer",) * (stages - attention) + ("attention",) * attention,
        se_downsamples=(False,) * 5 if large else (False, False, True, True),
        attention_norm="layer" if large else "batch",
    )


PRESETS = {
    "mci0": _mci((2, 6, 10, 2), 64, 3),
    "mci1": _mci((4, 12, 20, 4), 64, 3),
    "mci2": _mci((4, 12, 24, 4), 80, 3),
    "mci3": _mci((2, 12, 24, 4, 2), 96, 4),
    "mci4": _mci((2, 12, 24, 4, 4), 128, 4),
}
PRESETS["fastvithd"] = PRESETS["mci3"]


class SqueezeExcite(nn.Module):
    """y = x * sigmoid(fc2(relu(fc1(mean(x)))))  (arXiv:1709.01507)."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.fc1 = Linear(channels, hidden)
        self.fc2 = Linear(hidden, channels)

    def __call__(self, x: FeatureMap) -> mx.array:
        """(B, H, W, C) to the same shape."""
        x = whole(x)
        gate = global_average_pool(x)  # (B, C)
        gate = mx.sigmoid(self.fc2(mx.maximum(self.fc1(gate), 0)))
        return x * gate[:, None, None]


class Stem(nn.Module):
    """3x3 and depthwise 3x3 convolutions of stride 2, then 1x1; GELU after each."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = StemConv(channels)
        self.conv_bias = mx.zeros((channels,))
        self.depthwise = DepthwiseConv(channels, 3, stride=2)
        self.depthwise_bias = mx.zeros((channels,))
        self.pointwise = Linear(channels, channels)
        self.act = GELU()

    def __call__(self, pixels: mx.array) -> FeatureMap:
        """(B, S, S, 3) to (B, S/4, S/4, C)."""
        x = self.act(self.conv(pixels), self.conv_bias)
        x = self.act(self.depthwise(x), self.depthwise_bias)
        return self.act(self.pointwise(x))


class Downsample(nn.Module):
    """Halve the size, double the channels: 7x7 stride 2, [SE], GELU, 1x1, GELU."""

    def __init__(self, channels: int, squeeze_excite: bool):
        super().__init__()
        wide = 2 * channels
        self.depthwise = DepthwiseConvDouble(channels, 7, stride=2)
        self.se = SqueezeExcite(wide, wide // SE_RATIO_DOWNSAMPLE) if squeeze_excite else None
        self.pointwise = Linear(wide, wide)
        self.act = GELU()

    def __call__(self, x: FeatureMap) -> FeatureMap:
        """(B, H, W, C) to (B, H/2, W/2, 2C), sizes rounded up."""
        if self.se is None:
            x = self.act(self.depthwise(x), self.depthwise.bias)
        else:
            x = self.act(self.se(self.depthwise(x, self.depthwise.bias)))
        return self.act(self.pointwise(x))


class RepMixer(nn.Module):
    """Token mixing by a 3x3 depthwise convolution, with the residual folded into the kernel."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = DepthwiseConv(channels, 3)
        self.bias = mx.zeros((channels,))

    def __call__(self, x: FeatureMap, next_bias: mx.array) -> tuple[FeatureMap, FeatureMap]:
        """(B, H, W, C) to the same shape twice, the second time with `next_bias` added."""
        return conv_add_biases(x, self, next_bias)


class Attention(nn.Module):
    """Self-attention over all positions, with residual: y = x + proj(attend(norm(x)))."""

    def __init__(self, channels: int, norm: str):
        super().__init__()
        layer_norm = norm == "layer"
        self.norm = nn.LayerNorm(channels, LAYER_NORM_EPS) if layer_norm else None
        self.qkv = Linear(channels, 3 * channels, bias=not layer_norm)
        self.proj = Linear(channels, channels, bias=False)
        self.bias = mx.zeros((channels,))  # the bias of proj

    def __call__(self, x: FeatureMap, next_bias: mx.array) -> tuple[FeatureMap, FeatureMap]:
        """(B, H, W, C) to the same shape twice, the second time with `next_bias` added."""
        x = whole(x)
        B, H, W, C = x.shape
        qkv = self.qkv(x if self.norm is None else self.norm(x))
        qkv = qkv.reshape(B, H * W, 3, C // HEAD_DIM, HEAD_DIM)
        y = self_attention(qkv, training=self.training)
        return add_biases(add_product(x, y.reshape(x.shape), self.proj), self, next_bias)


class ConvFFN(nn.Module):
    """7x7 depthwise (BatchNorm and bias folded away), 1x1 up, GELU, 1x1 down."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.conv = DepthwiseConv(channels, 7)
        self.fc1 = Linear(channels, hidden)
        self.fc2 = Linear(hidden, channels)
        self.act = GELU()

    def __call__(self, x: FeatureMap, residual: FeatureMap) -> FeatureMap:
        """(B, H, W, C) twice to the same shape; `residual` already holds the bias of fc2."""
        return add_product(residual, self.act(self.fc1(self.conv(x))), self.fc2)


class Block(nn.Module):
    """x = mix(x), then y = x + ConvFFN(x); six GPU kernels if the mixer is a RepMixer."""

    def __init__(self, channels: int, mlp_ratio: float, token_mixer: str, norm: str):
        super().__init__()
        attention = token_mixer == "attention"
        self.token_mixer = Attention(channels, norm) if attention else RepMixer(channels)
        self.mlp = ConvFFN(channels, int(channels * mlp_ratio))

    def __call__(self, x: FeatureMap) -> FeatureMap:
        """(B, H, W, C) to the same shape."""
        x, residual = self.token_mixer(x, self.mlp.fc2.bias)
        return self.mlp(x, residual)


class PositionEncoding(nn.Module):
    """Conditional position encoding: y = x + dw7x7(x) + bias, with x folded into the kernel."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = DepthwiseConv(channels, 7)
        self.bias = mx.zeros((channels,))

    def __call__(self, x: FeatureMap) -> FeatureMap:
        """(B, H, W, C) to the same shape."""
        return self.conv(x, self.bias)


class Stage(nn.Module):
    """[Downsample], [position encoding before attention], blocks."""

    def __init__(self, config: FastViTConfig, index: int):
        super().__init__()
        channels, mixer = config.embed_dims[index], config.token_mixers[index]
        se = config.se_downsamples[index]
        self.downsample = Downsample(channels // 2, se) if index else None
        self.pos_emb = PositionEncoding(channels) if mixer == "attention" else None
        self.blocks = [
            Block(channels, config.mlp_ratios[index], mixer, config.attention_norm)
            for _ in range(config.layers[index])
        ]

    def __call__(self, x: FeatureMap) -> FeatureMap:
        """(B, H, W, C) to (B, H/2, W/2, 2C), sizes rounded up; the first stage keeps the shape."""
        for part in self.parts():
            x = part(x)
        return x

    def parts(self) -> list[nn.Module]:
        """Layers of the stage, in order."""
        return [part for part in (self.downsample, self.pos_emb, *self.blocks) if part is not None]


class FinalConv(nn.Module):
    """Double the channels: depthwise 3x3 (two outputs per channel), SE, GELU."""

    def __init__(self, channels: int):
        super().__init__()
        self.depthwise = DepthwiseConvDouble(channels, 3)
        self.se = SqueezeExcite(2 * channels, 2 * channels // SE_RATIO_FINAL)
        self.act = GELU()

    def __call__(self, x: FeatureMap) -> mx.array:
        """(B, H, W, C) to (B, H, W, 2C)."""
        return self.act(self.se(self.depthwise(x, self.depthwise.bias)))


class FastViT(nn.Module):
    """The tower: stem, stages, final convolution; no pooling and no projection."""

    def __init__(self, config: FastViTConfig):
        super().__init__()
        self.stem = Stem(config.embed_dims[0])
        self.stages = [Stage(config, i) for i in range(len(config.layers))]
        self.final_conv = FinalConv(config.embed_dims[-1])

    def __call__(self, pixels: mx.array) -> mx.array:
        """Compute the feature map of images.

        Args:
            pixels: (B, S, S, 3), RGB in [0, 1], or normalised as the checkpoint requires.

        Returns:
            (B, S/stride, S/stride, features); sizes round up.
        """
        x = pixels.astype(self.stem.conv.weight.dtype)
        return run([self.stem, *self.stages, self.final_conv], x, self.training)
