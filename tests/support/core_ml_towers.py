"""Write towers as Core ML programs, as coremltools exports them: BatchNorm and scales folded.

Tensors have timm's and open_clip's names and fused branches, as `synthetic` and `synthetic_clip`
make them. The name tables of the tested reader are not used.
"""

from pathlib import Path
from typing import Any

import numpy as np
import synthetic
from core_ml_file import Program

Tensors = dict[str, np.ndarray]
EPS = 1e-5


class TowerProgram(Program):
    """Appends layers to `x`, the latest value."""

    def __init__(self, tensors: Tensors, dtype: str = "float32"):
        super().__init__(dtype)
        self.tensors, self.x = tensors, ""

    def layer(self, kind: str, **parameters: Any) -> None:
        self.x = self.op(kind, x=self.x, **parameters)

    def gelu(self) -> None:
        self.layer("gelu", mode="EXACT")

    def conv(
        self,
        weight: np.ndarray,
        bias: np.ndarray,
        stride: int = 1,
        groups: int = 1,
        padding: int | None = None,
    ) -> None:
        pads = [side // 2 if padding is None else padding for side in weight.shape[2:]]
        self.layer(
            "conv",
            weight=weight,
            bias=bias,
            strides=[stride] * 2,
            pad_type="custom" if any(pads) else "valid",
            pad=[pad for pad in pads for _ in range(2)],
            groups=groups,
            dilations=[1, 1],
        )

    def fused(self, name: str, **options: int) -> None:
        self.conv(self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"], **options)

    def conv_norm(self, conv: str, norm: str, **options: int) -> None:
        t = self.tensors
        scale = t[f"{norm}.weight"] / np.sqrt(t[f"{norm}.running_var"] + EPS)
        bias = t[f"{norm}.bias"] - t[f"{norm}.running_mean"] * scale
        self.conv(t[f"{conv}.weight"] * scale[:, None, None, None], bias, **options)

    def linear(self, weight: str, bias: str | None) -> None:
        matrix = self.tensors[weight]
        zeros = np.zeros(len(matrix), np.float32)
        self.layer("linear", weight=matrix, bias=self.tensors[bias] if bias else zeros)

    def layer_norm(self, name: str, eps: float = EPS) -> None:
        gamma, beta = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        self.layer("layer_norm", gamma=gamma, beta=beta, epsilon=eps, axes=[-1])

    def add(self, other: str) -> None:
        self.x = self.op("add", x=other, y=self.x)

    def attention(self, mask: np.ndarray | None = None) -> None:
        qkv = self.op("split", x=self.x, axis=2)
        self.x = self.op("mul", x=qkv, y=0.25)
        self.x = self.op("matmul", x=self.x, y=qkv, transpose_y=True)
        if mask is not None:
            self.layer("add", y=mask)
        self.layer("softmax", axis=-1)
        self.x = self.op("matmul", x=self.x, y=qkv)


def fastvit(program: TowerProgram, layers: tuple[int, ...], norm: str, se: bool) -> None:
    """A FastViT trunk; `norm`, before attention, is "layer" (as elementary ops) or "batch"."""
    t = program.tensors
    C = t["stem.0.reparam_conv.bias"].size
    for i, (stride, groups) in enumerate(((2, 1), (2, C), (1, 1))):
        program.fused(f"stem.{i}.reparam_conv", stride=stride, groups=groups)
        program.gelu()
    for i, count in enumerate(layers):
        name = f"stages.{i}"
        if i:
            down = f"{name}.downsample.proj"
            program.fused(f"{down}.0.reparam_conv", stride=2, groups=C)
            C *= 2
            if se and i > 1:
                squeeze_excite(program, f"{down}.0.se")
            program.gelu()
            program.fused(f"{down}.1.reparam_conv")
            program.gelu()
        if f"{name}.pos_emb.reparam_conv.weight" in t:
            program.fused(f"{name}.pos_emb.reparam_conv", groups=C)
        for j in range(count):
            block(program, f"{name}.blocks.{j}", C, norm)
    program.fused("final_conv.reparam_conv", groups=C)
    squeeze_excite(program, "final_conv.se")
    program.gelu()


def squeeze_excite(program: TowerProgram, name: str) -> None:
    x = program.x
    program.layer("reduce_mean", axes=[2, 3], keep_dims=True)
    program.fused(f"{name}.fc1")
    program.layer("relu")
    program.fused(f"{name}.fc2")
    program.layer("sigmoid")
    program.x = program.op("mul", x=x, y=program.x)


def block(program: TowerProgram, name: str, C: int, norm: str) -> None:
    t, scale = program.tensors, "layer_scale"
    if f"{name}.token_mixer.qkv.weight" in t:
        x, scale = program.x, "layer_scale_2"
        if norm == "batch":
            names = {"gamma": "weight", "beta": "bias", "mean": "running_mean"}
            names |= {"variance": "running_var"}
            given = {ours: t[f"{name}.norm.{theirs}"] for ours, theirs in names.items()}
            program.layer("batch_norm", **given, epsilon=EPS)
        else:
            program.layer("sub", y=program.op("reduce_mean", x=x, axes=[1], keep_dims=True))
            squares = program.op("pow", x=program.x, y=2.0)
            mean = program.op("reduce_mean", x=squares, axes=[1], keep_dims=True)
            root = program.op("sqrt", x=program.op("add", x=mean, y=EPS))
            program.layer("real_div", y=root)
            given = {"gamma": t[f"{name}.norm.weight"], "beta": t[f"{name}.norm.bias"]}
            zeros, ones = np.zeros(C, np.float32), np.ones(C, np.float32)
            program.layer("batch_norm", **given, mean=zeros, variance=ones, epsilon=EPS)
        program.linear(f"{name}.token_mixer.qkv.weight", None)
        program.attention()
        program.linear(f"{name}.token_mixer.proj.weight", f"{name}.token_mixer.proj.bias")
        program.layer("mul", y=t[f"{name}.layer_scale_1.gamma"])
        program.add(x)
    else:
        program.fused(f"{name}.token_mixer.reparam_conv", groups=C)
    conv_ffn(program, f"{name}.mlp", t[f"{name}.{scale}.gamma"], C)


def conv_ffn(program: TowerProgram, name: str, gamma: np.ndarray, C: int) -> None:
    t, x = program.tensors, program.x
    program.conv_norm(f"{name}.conv.conv", f"{name}.conv.bn", groups=C)
    program.fused(f"{name}.fc1")
    program.gelu()
    program.conv(t[f"{name}.fc2.weight"] * gamma[..., None], t[f"{name}.fc2.bias"] * gamma[:, 0, 0])
    program.add(x)


def vit(program: TowerProgram, layers: int, padding: int) -> None:
    t, stem = program.tensors, "patch_embed.backbone"
    for i, size in enumerate((4, 2, 2)):
        options = {"stride": size, "padding": 0 if i else padding}
        if i < 2:
            program.conv_norm(f"{stem}.{i}.conv", f"{stem}.{i}.bn", **options)
            program.gelu()
        else:
            program.fused(f"{stem}.{i}.conv", **options)
    program.layer("add", y=t["pos_embed"])
    first = program.const(t["cls_token"])
    program.x = program.op("concat", values=[first, program.x], axis=1)
    for i in range(layers):
        parts = ("norm1", "attn.qkv.", "attn.proj.", "norm2", "mlp.fc1.", "mlp.fc2.")
        transformer_layer(program, f"blocks.{i}", parts, None)
    program.layer_norm("norm")


def text(program: TowerProgram, layers: int, causal: bool, rep_mixers: bool) -> None:
    t, rows = program.tensors, len(program.tensors["positional_embedding"])
    program.x = program.op("gather", x=t["token_embedding.weight"], indices=program.x, axis=0)
    program.layer("add", y=t["positional_embedding"][None])
    mask = np.where(np.triu(np.ones((rows, rows)), 1), -np.inf, 0).astype(np.float32)
    for i in range(layers + 2 * rep_mixers):
        name = f"transformer.resblocks.{i}"
        if rep_mixers and i in (0, layers + 1):
            C = t["token_embedding.weight"].shape[1]
            program.fused(f"{name}.token_mixer.reparam_conv", groups=C)
            conv_ffn(program, f"{name}.mlp", t[f"{name}.layer_scale.gamma"], C)
            continue
        parts = ("ln_1", "attn.in_proj_", "attn.out_proj.", "ln_2", "mlp.c_fc.", "mlp.c_proj.")
        transformer_layer(program, name, parts, mask[None, None] if causal else None)
    program.layer_norm("ln_final")
    program.x = program.op("gather_nd", x=program.x, indices=[0, 1])
    t["projection.weight"] = t["text_projection"].T.copy()
    program.linear("projection.weight", None)


def transformer_layer(
    program: TowerProgram, name: str, parts: tuple[str, ...], mask: np.ndarray | None
) -> None:
    norm1, qkv, proj, norm2, fc1, fc2 = (f"{name}.{part}" for part in parts)
    x = program.x
    program.layer_norm(norm1)
    program.linear(f"{qkv}weight", f"{qkv}bias")
    program.attention(mask)
    program.linear(f"{proj}weight", f"{proj}bias")
    program.add(x)
    x = program.x
    program.layer_norm(norm2)
    program.linear(f"{fc1}weight", f"{fc1}bias")
    program.gelu()
    program.linear(f"{fc2}weight", f"{fc2}bias")
    program.add(x)


def fastvithd_program(tensors: Tensors, layers: tuple[int, ...], dtype: str = "float32") -> Program:
    """FastVLM's image tower as Apple's export script writes it; tensors have timm's names."""
    program = TowerProgram(tensors, dtype)
    program.x = program.input("images", (1, 3, 256, 256))
    fastvit(program, layers, "layer", se=False)
    return program


def write_app_export(directory: Path) -> Path:
    """Write a tiny app export of FastVLM with its image tower in a Core ML package."""
    export = synthetic.write_layout(directory, "app export")
    program = fastvithd_program(tiny_fastvithd(), synthetic.TINY_LAYERS)
    program.write(export / "fastvithd.mlpackage")
    return export


def tiny_fastvithd() -> Tensors:
    """Tensors of the tiny checkpoint's image tower, with timm's names."""
    prefix = synthetic.TOWER
    tower = {k[len(prefix) :]: v for k, v in synthetic.apple_tensors().items() if prefix in k}
    return synthetic.renamed(tower, synthetic.timm_name)


def write_mobileclip(directory: Path, stem: str, config: Any, tensors: Tensors) -> None:
    """Write both packages of a MobileCLIP whose tensors have open_clip's names."""
    image = {
        k.removeprefix("visual.trunk."): v for k, v in tensors.items() if k.startswith("visual.")
    }
    program = TowerProgram(image)
    size = config.preprocess.image_size
    pixels = program.input("image", (1, 3, size, size))
    program.x = program.op("mul", x=pixels, y=1 / 255)
    if hasattr(config.image, "patches"):
        vit(program, config.image.layers, config.image.stem_padding)
        program.linear("head.weight", None)
    else:
        fastvit(program, config.image.layers, config.image.attention_norm, se=True)
        program.layer("reduce_mean", axes=[2, 3], keep_dims=False)
        program.linear("head.fc.weight", "head.fc.bias" if "head.fc.bias" in image else None)
    program.write(directory / f"{stem}_image.mlpackage")
    text_tensors = {k.removeprefix("text."): v for k, v in tensors.items() if k.startswith("text.")}
    program = TowerProgram(text_tensors)
    program.x = program.input("text", (1, config.text.context_length), 23)
    text(program, config.text.layers, config.text.causal, config.text.rep_mixers)
    program.write(directory / f"{stem}_text.mlpackage")
