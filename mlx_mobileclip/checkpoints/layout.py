"""Naming of tensors in a family of checkpoints.

Readers request tensors by common names: the part, then the name in timm for image towers, in
open_clip for text towers, in transformers for the decoder. A layout translates them to its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ..models.fastvit import FastViTConfig
from ..models.vit import ViTConfig
from .apple_names import VIT_NAMES, apple_name, apple_tower_name, network_indices


@dataclass(frozen=True, slots=True)
class Layout:
    """Naming of tensors in one family of checkpoints.

    Attributes:
        name: The family's name, for messages and the record of a conversion.
        prefixes: Prefix of the tensor names of each part of the model; without the parts that such
            checkpoints do not have.
        apple: Whether towers are named as in Apple's code rather than timm's and open_clip's.
        stem: Prefix of the stem's names in Apple's code; mlx-vlm inserts a level.
        nhwc: Whether convolution weights are (O, H, W, I).
    """

    name: str
    prefixes: Mapping[str, str]
    apple: bool
    stem: str = "patch_embed."
    nhwc: bool = False

    def tower_name(self, name: str, config: FastViTConfig | ViTConfig) -> str:
        """Translate timm's name of an image tower's tensor to this layout, without prefix."""
        if not self.apple:
            return name
        if isinstance(config, ViTConfig):
            return apple_name(name, VIT_NAMES)
        name = apple_tower_name(name, network_indices(config))
        return name.replace("patch_embed.", self.stem, 1)
