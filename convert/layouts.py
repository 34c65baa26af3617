"""How each family of FastVLM checkpoints names its tensors.

Layouts differ in names, in the order of convolution axes, and in what they leave out. Here they
are data: how a layout names the parts that the common names stand for (timm's for the tower,
Hugging Face's for the decoder). Source of the maps: apple/ml-fastvlm 592b4ad `llava/model`,
transformers 5.23 `models/fast_vlm/convert_fastvlm_weights_to_hf.py`, mlx-vlm 0.7.10
`models/fastvlm`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import mlx.core as mx

from mlx_mobileclip.errors import CheckpointError
from mlx_mobileclip.fastvit import FastViTConfig

from .apple import apple_tower_name, network_indices
from .source import Source


@dataclass(frozen=True, slots=True)
class Layout:
    """How one family of checkpoints names its tensors.

    Attributes:
        name: For messages and for the record.
        decoder: Stands for "model." in the decoder's names.
        lm_head: The output layer.
        projector: The projector's layers; {i} counts 0, 1, {even} 0, 2, {ordinal} 1, 2.
        vision: Prefix of the tower; empty if the layout has none.
        apple: Whether the tower's names are Apple's rather than timm's.
        stem: Apple's stem; mlx-vlm inserts a level.
        nhwc: Whether convolution weights are (O, H, W, I).
    """

    name: str
    decoder: str
    lm_head: str
    projector: str
    vision: str
    apple: bool = True
    stem: str = "patch_embed."
    nhwc: bool = False


LAYOUTS = (
    Layout(
        name="llava_qwen2",
        decoder="model.",
        lm_head="lm_head",
        projector="model.mm_projector.{even}",
        vision="model.vision_tower.vision_tower.model.",
    ),
    Layout(
        name="fast_vlm",
        decoder="model.language_model.",
        lm_head="lm_head",
        projector="model.multi_modal_projector.linear_{ordinal}",
        vision="model.vision_tower.timm_model.",
        apple=False,
    ),
    Layout(
        name="fast_vlm (before transformers 5)",
        decoder="language_model.model.",
        lm_head="language_model.lm_head",
        projector="multi_modal_projector.linear_{ordinal}",
        vision="vision_tower.timm_model.",
        apple=False,
    ),
    Layout(
        name="mlx-vlm",
        decoder="language_model.model.",
        lm_head="language_model.lm_head",
        projector="mm_projector.{even}",
        vision="vision_tower.vision_model.",
        stem="patch_embed.blocks.",
        nhwc=True,
    ),
    Layout(
        name="app export",
        decoder="language_model.model.",
        lm_head="language_model.lm_head",
        projector="multi_modal_projector.linear_{even}",
        vision="",
    ),
)


def detect(keys: Iterable[str], where: str) -> Layout:
    """The layout these names belong to; raises CheckpointError if it is none of them."""
    keys = list(keys)
    for layout in LAYOUTS:
        if layout.vision and any(key.startswith(layout.vision) for key in keys):
            return layout
    for layout in reversed(LAYOUTS):  # without a tower: by decoder and projector
        markers = layout.decoder, layout.projector.split("{")[0]
        if all(any(key.startswith(marker) for key in keys) for marker in markers):
            return layout
    raise CheckpointError(
        f"{where}: its tensors ({', '.join(sorted(keys)[:3])}, ...) are named like no known "
        f"FastVLM; known are {', '.join(layout.name for layout in LAYOUTS)}"
    )


def named_source(
    tensors: dict[str, mx.array],
    layout: Layout,
    vision: FastViTConfig,
    projector_type: str,
    where: str,
) -> Source:
    """The tensors under common names."""
    return Source(tensors, names(layout, vision, projector_type), where, layout.nhwc)


def names(layout: Layout, vision: FastViTConfig, projector_type: str) -> Callable[[str], str]:
    """What turns a common name (vision.*, projector.N.*, model.*, lm_head.*) into a layout's."""
    network = network_indices(vision)

    def tower_name(rest: str) -> str:
        if not layout.apple:
            return rest
        return apple_tower_name(rest, network).replace("patch_embed.", layout.stem, 1)

    def name(common: str) -> str:
        part, _, rest = common.partition(".")
        if part == "vision":
            return layout.vision + tower_name(rest)
        if part == "projector":
            if projector_type == "linear" and ".{even}" in layout.projector:
                return layout.projector.removesuffix(".{even}") + "." + rest.partition(".")[2]
            i, _, rest = rest.partition(".")
            layer = layout.projector.format(even=2 * int(i), ordinal=int(i) + 1)
            return f"{layer}.{rest}"
        if part == "lm_head":
            return f"{layout.lm_head}.{rest}"
        return layout.decoder + rest

    return name
