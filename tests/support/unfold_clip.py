"""The inverse of reading a MobileCLIP: canonical tensors as a source checkpoint has them."""

from convert.export.unfold import (
    add_prefix,
    identity_norm,
    rename,
    strip_prefix,
    unfold_tower,
)
from mlx_mobileclip.checkpoints.source import Tensors
from mlx_mobileclip.models.clip import MobileCLIPConfig
from mlx_mobileclip.models.vit import STEM_SIZES, ViTConfig

# Patterns of canonical names and their replacements in common names, applied in order.
Names = tuple[tuple[str, str], ...]
VIT_NAMES = (
    (r"^stem\.convs\.(\d)\.", r"patch_embed.backbone.\1.conv."),
    (r"^class_token$", "cls_token"),
    (r"^positions$", "pos_embed"),
    (r"^layers\.(\d+)\.(qkv|proj)\.", r"blocks.\1.attn.\2."),
    (r"^layers\.(\d+)\.(fc[12])\.", r"blocks.\1.mlp.\2."),
    (r"^layers\.", "blocks."),
)
TEXT_NAMES = (
    (r"^embedding\.", "token_embedding."),
    (r"^positions$", "positional_embedding"),
    (r"^norm\.", "ln_final."),
    (r"^projection\.weight$", "text_projection"),
    (r"\.norm([12])\.", r".ln_\1."),
    (r"\.qkv\.", ".attn.in_proj_"),
    (r"\.proj\.", ".attn.out_proj."),
    (r"\.fc1\.", ".mlp.c_fc."),
    (r"\.fc2\.", ".mlp.c_proj."),
    (r"^layers\.", "transformer.resblocks."),
)
REP_MIXER_NAMES = (  # of a text tower's blocks; their parts are called as in an image tower
    (r"^(layers\.\d+)\.mixer\.", r"\1.token_mixer.conv."),
    (r"^(layers\.\d+)\.bias$", r"\1.token_mixer.bias"),
    (r"^(layers\.\d+)\.(conv|fc1|fc2)\.", r"\1.mlp.\2."),
    (r"^layers\.", "transformer.resblocks."),
)


def unfold_mobileclip(config: MobileCLIPConfig, tensors: Tensors, apple: bool) -> Tensors:
    """The tensors that a source checkpoint holds for these canonical ones.

    Apple's code stores the weight of the projection transposed.
    """
    trunk, vit = strip_prefix("image.trunk.", tensors), isinstance(config.image, ViTConfig)
    weight, bias = (tensors[f"image.projection.{kind}"] for kind in ("weight", "bias"))
    head = "image.head." if vit else "image.head.fc."
    out = add_prefix("image.", _unfold_vit(trunk) if vit else unfold_tower(trunk))
    out |= {f"{head}weight": weight.T if apple else weight, f"{head}bias": bias}
    if config.text is not None:
        out |= add_prefix("text.", _unfold_text(strip_prefix("text.", tensors)))
        out["logit_scale"] = tensors["logit_scale"]
    return out


def _unfold_vit(folded: Tensors) -> Tensors:
    """A vision transformer. The biases of its stem become those of its BatchNorms."""
    names: Names = VIT_NAMES
    if "stem.convs.1.weight" not in folded:
        names = ((r"^stem\.convs\.0\.", "patch_embed.proj."), *names)
    out = {
        rename(name, names): value.transpose(0, 3, 1, 2) if value.ndim == 4 else value
        for name, value in folded.items()
    }
    for i in range(len(STEM_SIZES) - 1):
        layer = f"patch_embed.backbone.{i}"
        if f"{layer}.conv.bias" in out:
            bias = out.pop(f"{layer}.conv.bias")
            out |= identity_norm(f"{layer}.bn", bias) | {f"{layer}.bn.bias": bias}
    return out


def _unfold_text(folded: Tensors) -> Tensors:
    """A text tower. Its RepMixer blocks are those of an image tower with kernels of height 1."""
    out: Tensors = {}
    blocks: Tensors = {}
    for name, tensor in folded.items():
        if ".".join(name.split(".")[:2]) + ".mixer.weight" in folded:
            kernel = tensor.ndim == 3
            blocks[rename(name, REP_MIXER_NAMES)] = tensor[:, None] if kernel else tensor
        else:
            out[rename(name, TEXT_NAMES)] = tensor.T if name == "projection.weight" else tensor
    return out | unfold_tower(blocks)
