"""How a family of checkpoints names its tensors.

Readers ask for tensors by common names: timm's for image towers, open_clip's for text towers,
Hugging Face's for the decoder, after the name of the part. A layout turns a common name into its
own.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ..models.fastvit import FastViTConfig
from ..models.vit import ViTConfig
from .apple_names import VIT_NAMES, apple_name, apple_tower_name, network_indices


@dataclass(frozen=True, slots=True)
class Layout:
    """How one family of checkpoints names its tensors.

    Attributes:
        name: The family's name, for messages and the record of a conversion.
        prefixes: By the part of the model, the beginning of its tensors' names. A part that such
            checkpoints do not hold is missing.
        apple: Whether towers are named as in Apple's code rather than timm's and open_clip's.
        stem: Beginning of the stem's names in Apple's code; mlx-vlm inserts a level.
        nhwc: Whether convolution weights are (O, H, W, I).
    """

    name: str
    prefixes: Mapping[str, str]
    apple: bool
    stem: str = "patch_embed."
    nhwc: bool = False

    def tower_name(self, name: str, config: FastViTConfig | ViTConfig) -> str:
        """Turn timm's name of a tensor of an image tower into this layout's, without prefix."""
        if not self.apple:
            return name
        if isinstance(config, ViTConfig):
            return apple_name(name, VIT_NAMES)
        name = apple_tower_name(name, network_indices(config))
        return name.replace("patch_embed.", self.stem, 1)
