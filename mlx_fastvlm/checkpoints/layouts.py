"""The layouts of FastVLM checkpoints.

They differ in tensor names, the order of convolution axes, and which parts they contain. Source:
apple/ml-fastvlm 592b4ad `llava/model`, transformers 5.23
`models/fast_vlm/convert_fastvlm_weights_to_hf.py`, mlx-vlm 0.7.10 `models/fastvlm`.
"""

from collections.abc import Callable, Iterable

import mlx.core as mx

from mlx_mobileclip.checkpoints.layout import Layout
from mlx_mobileclip.checkpoints.source import Source
from mlx_mobileclip.errors import CheckpointError
from mlx_mobileclip.models.fastvit import FastViTConfig

# The parts are "vision", "projector", "model" (the decoder) and "lm_head". In a projector's prefix
# {even} counts its layers as 0, 2 and {ordinal} as 1, 2.
FASTVLM_LAYOUTS = (
    Layout(
        name="llava_qwen2",
        prefixes={
            "vision": "model.vision_tower.vision_tower.model.",
            "projector": "model.mm_projector.{even}.",
            "model": "model.",
            "lm_head": "lm_head.",
        },
        apple=True,
    ),
    Layout(
        name="fast_vlm",
        prefixes={
            "vision": "model.vision_tower.timm_model.",
            "projector": "model.multi_modal_projector.linear_{ordinal}.",
            "model": "model.language_model.",
            "lm_head": "lm_head.",
        },
        apple=False,
    ),
    Layout(
        name="fast_vlm (before transformers 5)",
        prefixes={
            "vision": "vision_tower.timm_model.",
            "projector": "multi_modal_projector.linear_{ordinal}.",
            "model": "language_model.model.",
            "lm_head": "language_model.lm_head.",
        },
        apple=False,
    ),
    Layout(
        name="mlx-vlm",
        prefixes={
            "vision": "vision_tower.vision_model.",
            "projector": "mm_projector.{even}.",
            "model": "language_model.model.",
            "lm_head": "language_model.lm_head.",
        },
        apple=True,
        stem="patch_embed.blocks.",
        nhwc=True,
    ),
    Layout(
        name="app export",
        prefixes={
            "projector": "multi_modal_projector.linear_{even}.",
            "model": "language_model.model.",
            "lm_head": "language_model.lm_head.",
        },
        apple=True,
    ),
)


def detect(keys: Iterable[str], where: str) -> Layout:
    """Return the layout that has tensors of these names; raises CheckpointError if none does."""
    keys = list(keys)
    for layout in FASTVLM_LAYOUTS:
        if tower_keys(keys, layout):
            return layout
    for layout in reversed(FASTVLM_LAYOUTS):  # without a tower: by decoder and projector
        markers = layout.prefixes["model"], layout.prefixes["projector"].split("{")[0]
        if all(any(key.startswith(marker) for key in keys) for marker in markers):
            return layout
    raise CheckpointError(
        f"{where}: tensor names ({', '.join(sorted(keys)[:3])}, ...) match no known FastVLM "
        f"layout; known are {', '.join(layout.name for layout in FASTVLM_LAYOUTS)}"
    )


def tower_keys(keys: Iterable[str], layout: Layout) -> list[str]:
    """Return the names of the image tower's tensors."""
    prefix = layout.prefixes.get("vision")
    return [] if prefix is None else [key for key in keys if key.startswith(prefix)]


def fastvlm_source(
    tensors: dict[str, mx.array],
    layout: Layout,
    vision: FastViTConfig,
    projector_type: str,
    where: str,
) -> Source:
    """Source of the tensors by common name: vision.*, projector.N.*, model.*, lm_head.*."""
    return Source(tensors, source_name(layout, vision, projector_type), where, layout.nhwc)


def source_name(layout: Layout, vision: FastViTConfig, projector_type: str) -> Callable[[str], str]:
    """Return a function that converts a common name to the layout's."""

    def name(common: str) -> str:
        part, _, rest = common.partition(".")
        prefix = layout.prefixes[part]
        if part == "vision":
            return prefix + layout.tower_name(rest, vision)
        if part == "projector":
            index, _, rest = rest.partition(".")
            if projector_type == "linear":
                prefix = prefix.replace("{even}.", "")
            prefix = prefix.format(even=2 * int(index), ordinal=int(index) + 1)
        return prefix + rest

    return name
