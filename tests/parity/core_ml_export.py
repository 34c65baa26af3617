"""Export towers with coremltools as Apple does: the same formulas and settings.

Image towers of FastViT are timm's with fused branches; what Apple's code computes differently (the
LayerNorm of FastViTHD, text towers, ViT-B) is written down here from apple/ml-mobileclip 4144bb1
and apple/ml-fastvlm 592b4ad. Modules carry Apple's names, so that its checkpoints can be loaded.
"""

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import synthetic
import synthetic_clip
from oracle import torch
from synthetic_clip import Tensors
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # coremltools warns about missing macOS libraries
    import coremltools as ct
    from coremltools.converters.mil.frontend.torch import ops as torch_ops

    logging.disable(logging.NOTSET)

_cast = torch_ops._cast


class _Int(int):
    """int() of an array with one element, which NumPy 2.4 refuses and coremltools 9 wants."""

    def __new__(cls, value: Any) -> Any:
        return int(np.asarray(value).item())


torch_ops._cast = lambda context, node, kind, name: _cast(
    context, node, _Int if kind is int else kind, name
)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Any, mask: Any) -> Any:
        B, L, D = x.shape
        qkv = self.qkv_proj(x).reshape(B, L, 3, self.heads, -1).transpose(1, 3).contiguous()
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        scores = (q * (D // self.heads) ** -0.5) @ k.transpose(-1, -2)
        if mask is not None:
            scores = scores + mask.unsqueeze(1)
        return self.out_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, L, -1))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.pre_norm_mha = nn.ModuleList([nn.LayerNorm(width), Attention(width, heads)])
        up, down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.pre_norm_ffn = nn.Sequential(
            nn.LayerNorm(width), up, nn.GELU(), nn.Dropout(0.0), down, nn.Dropout(0.0)
        )

    def forward(self, x: Any, mask: Any = None) -> Any:
        norm, attention = self.pre_norm_mha
        x = x + attention(norm(x), mask)
        return x + self.pre_norm_ffn(x)


class Mixer(nn.Module):
    """RepMixer block along texts, the mixer's branches fused."""

    def __init__(self, width: int):
        super().__init__()
        options = {"kernel_size": (1, 11), "padding": (0, 5), "groups": width}
        self.token_mixer = nn.ModuleDict({"reparam_conv": nn.Conv2d(width, width, **options)})
        self.convffn = nn.ModuleDict(
            {
                "conv": nn.Sequential(),
                "fc1": nn.Conv2d(width, 4 * width, 1),
                "act": nn.GELU(),
                "fc2": nn.Conv2d(4 * width, width, 1),
            }
        )
        self.convffn["conv"].add_module("conv", nn.Conv2d(width, width, bias=False, **options))
        self.convffn["conv"].add_module("bn", nn.BatchNorm2d(width))
        self.layer_scale = nn.Parameter(torch.ones(width, 1, 1))

    def forward(self, x: Any, mask: Any = None) -> Any:
        x = self.token_mixer["reparam_conv"](x.permute(0, 2, 1).unsqueeze(2))
        y = x
        for part in self.convffn.values():
            y = part(y)
        return (x + self.layer_scale * y).squeeze(2).permute(0, 2, 1)


class Text(nn.Module):
    def __init__(self, config: Any, embed_dim: int):
        super().__init__()
        width = config.width
        self.embedding_layer = nn.Embedding(config.vocab_size, width)
        self.positions = nn.Parameter(torch.zeros(1, 1, config.context_length, width))
        layers: list[nn.Module] = [Layer(width, config.heads) for _ in range(config.layers)]
        if config.rep_mixers:
            layers = [Mixer(width), *layers, Mixer(width)]
        self.transformer = nn.ModuleList(layers)
        self.final_layer_norm = nn.LayerNorm(width)
        self.projection_layer = nn.Parameter(torch.zeros(width, embed_dim))
        self.causal = config.causal

    def forward(self, text: Any) -> Any:
        x = self.embedding_layer(text) + self.positions[0]
        mask = None
        if self.causal:
            mask = torch.full((77, 77), float("-inf")).triu_(1).unsqueeze(0)
            mask = mask.expand(text.shape[0], -1, -1)
        for layer in self.transformer:
            x = layer(x, mask)
        x = self.final_layer_norm(x)
        x = x[torch.arange(text.shape[0]), text.argmax(dim=-1)]
        return x @ self.projection_layer


class ViT(nn.Module):
    def __init__(self, config: Any, embed_dim: int):
        super().__init__()
        width, quarter = config.width, config.width // 4
        self.patch_emb = nn.ModuleList([nn.Module() for _ in range(3)])
        for i, (inputs, outputs, size) in enumerate(
            ((3, quarter, 4), (quarter, quarter, 2), (quarter, width, 2))
        ):
            block = nn.Sequential()
            padding = (size - 1) // 2
            conv = nn.Conv2d(inputs, outputs, size, size, padding=padding, bias=i == 2)
            block.add_module("conv", conv)
            if i < 2:
                block.add_module("norm", nn.BatchNorm2d(outputs))
                block.add_module("act", nn.GELU())
            self.patch_emb[i].block = block
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 1, config.patches, width))
        self.transformer = nn.ModuleList([Layer(width, config.heads) for _ in range(config.layers)])
        self.post_transformer_norm = nn.LayerNorm(width)
        self.projection = nn.Parameter(torch.zeros(width, embed_dim))

    def forward(self, image: Any) -> Any:
        x = image
        for part in self.patch_emb:
            x = part.block(x)
        x = x.flatten(2).transpose(1, 2).contiguous() + self.positions[0]
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        for layer in self.transformer:
            x = layer(x)
        return self.post_transformer_norm(x)[:, 0] @ self.projection


class LayerNormChannel(nn.Module):
    """LayerNorm over the channels of a map, step by step as in Apple's code."""

    def __init__(self, weight: Any, bias: Any):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Any) -> Any:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + 1e-5)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class Features(nn.Module):
    """FastViTHD as in FastVLM's export: the feature map flattened to a sequence."""

    def __init__(self, trunk: Any):
        super().__init__()
        self.trunk = trunk

    def forward(self, images: Any) -> Any:
        return self.trunk.forward_features(images).flatten(2).transpose(1, 2)


def fastvithd(tensors: synthetic.Tensors) -> Any:
    """timm's trunk with Apple's LayerNorm."""
    trunk = oracle.tower(tensors, inference_mode=True)
    for module in list(trunk.modules()):
        norm = getattr(module, "norm", None)
        if hasattr(module, "token_mixer") and isinstance(norm, nn.LayerNorm):
            module.norm = LayerNormChannel(norm.weight, norm.bias)
    return trunk


def apple_towers(config: Any, tensors: Tensors) -> tuple[Any, Any]:
    """Image and text tower of a MobileCLIP, given an Apple checkpoint with fused branches."""
    import timm

    if hasattr(config.image, "patches"):
        image = ViT(config.image, config.embed_dim)
        names = {
            "pos_embed.pos_embed.pos_embed": "positions",
            "classifier.proj": "projection",
        }
        load(image, tensors, "image_encoder.model.", names)
    else:
        tower = config.image
        name = {64: {2: "mci0", 4: "mci1"}, 80: {4: "mci2"}}[tower.embed_dims[0]][tower.layers[0]]
        image = timm.create_model(
            f"fastvit_{name}", num_classes=config.embed_dim, inference_mode=True
        )
        renamed = synthetic_clip.open_clip_tensors(tensors)
        load(image, renamed, "visual.trunk.", {})
    text = Text(config.text, config.embed_dim)
    load(text, tensors, "text_encoder.", {"positional_embedding.pos_embed.pos_embed": "positions"})
    return image.eval(), text.eval()


def folded_and_rounded(module: Any) -> Any:
    """Fold BatchNorm and layer scales into convolutions, and round weights to float16.

    A package in float16 then holds exactly the weights that PyTorch computes with.
    """
    for part in module.modules():
        names = dict(part.named_children())
        norm = next((n for n in ("bn", "norm") if isinstance(names.get(n), nn.BatchNorm2d)), None)
        if norm and isinstance(names.get("conv"), nn.Conv2d):
            part.conv = torch.nn.utils.fuse_conv_bn_eval(part.conv, names[norm])
            setattr(part, norm, nn.Identity())
        for name in ("layer_scale", "layer_scale_2"):
            scale = getattr(part, name, None)
            gamma = getattr(scale, "gamma", scale)
            ffn = getattr(part, "mlp", getattr(part, "convffn", None))
            if isinstance(gamma, nn.Parameter) and ffn is not None:
                last = ffn["fc2"] if isinstance(ffn, nn.ModuleDict) else ffn.fc2
                last.weight.data *= gamma.data[..., None]
                last.bias.data *= gamma.data[:, 0, 0]
                gamma.data.fill_(1)
    for value in (*module.parameters(), *module.buffers()):
        if value.is_floating_point():
            value.data = value.data.half().float()
    return module


def load(module: Any, tensors: Tensors, prefix: str, names: dict[str, str]) -> None:
    state = {}
    for key, value in tensors.items():
        if key.startswith(prefix):
            key = key[len(prefix) :]
            state[names.get(key, key)] = torch.from_numpy(np.ascontiguousarray(value))
    state |= {key: torch.zeros((), dtype=torch.int64) for key in oracle.counters(module)}
    module.load_state_dict(state, strict=True)


def export(module: Any, given: Any, path: Path, *, half: bool, target: Any = None) -> Any:
    """Trace the model on an example input, convert it to Core ML, and save the package."""
    pixels = given.ndim == 4
    if isinstance(module, Features):
        kind = ct.TensorType(name="images", shape=given.shape)
    elif pixels:
        kind = ct.ImageType(name="image", shape=given.shape, scale=1 / 255)
    else:
        kind = ct.TensorType(name="text", shape=given.shape, dtype=np.int32)
    precision = ct.precision.FLOAT16 if half else ct.precision.FLOAT32
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, given, check_trace=False)
        model = ct.convert(
            traced,
            inputs=[kind],
            convert_to="mlprogram",
            minimum_deployment_target=target or ct.target.iOS16,
            compute_precision=precision,
        )
        model.save(str(path))
    return model
