"""Translate common names (timm's, open_clip's) to those of Apple's code.

Source: apple/ml-fastvlm 592b4ad and apple/ml-mobileclip 4144bb1 `mobileclip/models/mci.py`,
`mobileclip/models/vit.py`, `mobileclip/text_encoder.py`.
"""

import re
from collections.abc import Mapping

from ..models.fastvit import FastViTConfig

# Pattern in the common name -> replacement; each table is applied in order.
TOWER_NAMES = (
    (r"^stem\.", "patch_embed."),
    (r"^final_conv\.se\.fc1\.", "final_conv.se.reduce."),
    (r"^final_conv\.se\.fc2\.", "final_conv.se.expand."),
    (r"^final_conv\.", "conv_exp."),
    (r"\.proj\.0\.reparam_conv\.", ".proj.0.lkb_reparam."),
    (r"\.large_conv\.", ".lkb_origin."),
    (r"\.mlp\.", ".convffn."),
    (r"\bconv_kxk\b", "rbr_conv"),
    (r"\bconv_scale\b", "rbr_scale"),
    (r"\bidentity\b", "rbr_skip"),
    (r"\bpos_enc\b", "pe"),
    (r"\.gamma$", ""),
    (r"^head\.fc\.weight$", "head.proj"),
)
VIT_NAMES = (
    (r"^patch_embed\.backbone\.(\d)\.conv\.", r"patch_emb.\1.block.conv."),
    (r"^patch_embed\.backbone\.(\d)\.bn\.", r"patch_emb.\1.block.norm."),
    (r"^pos_embed$", "pos_embed.pos_embed.pos_embed"),
    (r"^norm\.", "post_transformer_norm."),
    (r"^blocks\.", "transformer."),
    (r"\.norm1\.", ".pre_norm_mha.0."),
    (r"\.attn\.qkv\.", ".pre_norm_mha.1.qkv_proj."),
    (r"\.attn\.proj\.", ".pre_norm_mha.1.out_proj."),
    (r"\.norm2\.", ".pre_norm_ffn.0."),
    (r"\.mlp\.fc1\.", ".pre_norm_ffn.1."),
    (r"\.mlp\.fc2\.", ".pre_norm_ffn.4."),
    (r"^head\.weight$", "classifier.proj"),
)
TEXT_NAMES = (
    (r"^transformer\.resblocks\.", "transformer."),
    (r"^token_embedding\.", "embedding_layer."),
    (r"^positional_embedding$", "positional_embedding.pos_embed.pos_embed"),
    (r"^ln_final\.", "final_layer_norm."),
    (r"^text_projection$", "projection_layer"),
    (r"\.ln_1\.", ".pre_norm_mha.0."),
    (r"\.attn\.in_proj_", ".pre_norm_mha.1.qkv_proj."),
    (r"\.attn\.out_proj\.", ".pre_norm_mha.1.out_proj."),
    (r"\.ln_2\.", ".pre_norm_ffn.0."),
    (r"\.mlp\.c_fc\.", ".pre_norm_ffn.1."),
    (r"\.mlp\.c_proj\.", ".pre_norm_ffn.4."),
    *TOWER_NAMES,  # for S0's RepMixer blocks
)


def apple_name(name: str, names: tuple[tuple[str, str], ...]) -> str:
    """Translate a common name to Apple's."""
    for pattern, replacement in names:
        name = re.sub(pattern, replacement, name)
    return name


def network_indices(config: FastViTConfig) -> dict[str, int]:
    """Index of each part of the stages in Apple's flat `network` list."""
    parts = []
    for stage, mixer in enumerate(config.token_mixers):
        parts += [f"stages.{stage}.downsample"] if stage else []
        parts += [f"stages.{stage}.pos_emb"] if mixer == "attention" else []
        parts += [f"stages.{stage}.blocks"]
    return {part: index for index, part in enumerate(parts)}


def apple_tower_name(name: str, network: Mapping[str, int]) -> str:
    """Translate timm's name of a part of a FastViT tower to Apple's."""
    stage = re.match(r"stages\.\d+\.(?:downsample|pos_emb|blocks)", name)
    if stage:
        name = f"network.{network[stage[0]]}{name[stage.end() :]}"
    return apple_name(name, TOWER_NAMES)
