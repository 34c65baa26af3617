"""Canonical tensors of a FastVLM as its sources hold them: folding and fusing, backwards.

Names are the converter's common ones: timm's for the tower, Hugging Face's for the decoder. Packed
layers are split as they are, for their rows are packed one by one. Nothing is computed before a
tensor is asked for.
"""

import mlx.core as mx

from mlx_fastvlm.config import FastVLMConfig, Qwen2Config
from mlx_mobileclip.fastvit import FastViTConfig

from .quantize import Tensors

BATCH_NORM_EPS = 1e-5
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


def unfold(config: FastVLMConfig, tensors: Tensors) -> Tensors:
    """The fused source checkpoint that converts to these canonical tensors."""
    tower = "vision_tower."
    folded = {k.removeprefix(tower): v for k, v in tensors.items() if k.startswith(tower)}
    return (
        {f"vision.{k}": v for k, v in unfold_tower(config.vision, folded).items()}
        | {k: v for k, v in tensors.items() if k.startswith("projector.")}
        | split_decoder(config.text, tensors)
    )


def source_paths(path: str) -> list[str]:
    """The layers of a source, by their common names, that a canonical one was made from."""
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


def unfold_tower(config: FastViTConfig, folded: Tensors) -> Tensors:
    """A tower with attention normalised by LayerNorm and no squeezing between stages: FastVLM's.

    Folding forgets what it combined. What the fused source keeps apart is filled in so that it
    changes nothing: layer scales of one, and BatchNorms that return their input.
    """
    unfolding = _Unfold(folded)
    unfolding.conv("stem.0.reparam_conv", "stem.conv", bias="stem.conv_bias")
    unfolding.conv("stem.1.reparam_conv", "stem.depthwise", bias="stem.depthwise_bias")
    unfolding.pointwise("stem.2.reparam_conv", "stem.pointwise")
    for i, mixer in enumerate(config.token_mixers):
        if i:
            down = f"stages.{i}.downsample"
            unfolding.double(f"{down}.proj.0.reparam_conv", f"{down}.depthwise")
            unfolding.pointwise(f"{down}.proj.1.reparam_conv", f"{down}.pointwise")
        if mixer == "attention":
            pos = f"stages.{i}.pos_emb"
            unfolding.conv(f"{pos}.reparam_conv", f"{pos}.conv", bias=f"{pos}.bias")
        for j in range(config.layers[i]):
            unfolding.block(f"stages.{i}.blocks.{j}", mixer, config.embed_dims[i])
    unfolding.double("final_conv.reparam_conv", "final_conv.depthwise")
    for layer in ("fc1", "fc2"):
        unfolding.pointwise(f"final_conv.se.{layer}", f"final_conv.se.{layer}")
    return unfolding.tensors


class _Unfold:
    """Tensors on their way; each method puts the module at `dst` that `src` was folded from."""

    def __init__(self, folded: Tensors):
        self.folded = folded
        self.dtype = folded["stem.conv.weight"].dtype
        self.tensors: Tensors = {}

    def conv(self, dst: str, src: str, bias: str) -> None:
        self.tensors[f"{dst}.weight"] = _oihw(self.folded[f"{src}.weight"])
        self.tensors[f"{dst}.bias"] = self.folded[bias]

    def double(self, dst: str, src: str) -> None:
        halves = [self.folded[f"{src}.{half}.weight"] for half in ("even", "odd")]
        weight = mx.stack(halves, axis=1).reshape(-1, *halves[0].shape[1:])
        self.tensors[f"{dst}.weight"] = _oihw(weight)
        self.tensors[f"{dst}.bias"] = self.folded[f"{src}.bias"]

    def pointwise(self, dst: str, src: str) -> None:
        self.tensors[f"{dst}.weight"] = self.folded[f"{src}.weight"][:, :, None, None]
        self.tensors[f"{dst}.bias"] = self.folded[f"{src}.bias"]

    def block(self, name: str, mixer: str, channels: int) -> None:
        mix, mlp, one = f"{name}.token_mixer", f"{name}.mlp", mx.ones((channels, 1, 1), self.dtype)
        if mixer == "attention":
            for kind in ("weight", "bias"):
                self.tensors[f"{name}.norm.{kind}"] = self.folded[f"{mix}.norm.{kind}"]
            for layer in ("qkv", "proj"):
                self.tensors[f"{mix}.{layer}.weight"] = self.folded[f"{mix}.{layer}.weight"]
            self.tensors[f"{mix}.proj.bias"] = self.folded[f"{mix}.bias"]
            self.tensors |= {f"{name}.layer_scale_{i}.gamma": one for i in (1, 2)}
        else:
            self.conv(f"{mix}.reparam_conv", f"{mix}.conv", bias=f"{mix}.bias")
            self.tensors[f"{name}.layer_scale.gamma"] = one
        self.tensors[f"{mlp}.conv.conv.weight"] = _oihw(self.folded[f"{mlp}.conv.weight"])
        self.identity_norm(f"{mlp}.conv.bn", channels)
        for layer in ("fc1", "fc2"):
            self.pointwise(f"{mlp}.{layer}", f"{mlp}.{layer}")

    def identity_norm(self, dst: str, channels: int) -> None:
        """A BatchNorm of gain 1: to 7e-9 in float32, to 5e-6 where half precision stores 1."""
        ones, zeros = mx.ones((channels,), self.dtype), mx.zeros((channels,), self.dtype)
        self.tensors |= {f"{dst}.weight": ones, f"{dst}.bias": zeros}
        self.tensors[f"{dst}.running_mean"] = zeros
        self.tensors[f"{dst}.running_var"] = mx.full((channels,), 1 - BATCH_NORM_EPS, self.dtype)


def _oihw(weight: mx.array) -> mx.array:
    return weight.transpose(0, 3, 1, 2)
