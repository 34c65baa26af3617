"""Under which names of repositories and files the published models are found.

Source: open_clip 3.3.0 `pretrained.py`, timm 1.0.31, and the model cards.
"""

from pathlib import PurePath

from ..models.variants import TOWERS, variant_named
from .hub import OWNERS, WEIGHT_SUFFIXES, is_repository

# Of a name, and of a name of timm's after the tower: that it is a port of Apple's model.
_PORTS = ("-OpenCLIP", "_timm")
_ORIGINS = ("apple_mclip", "apple_mclip_lt", "apple_mclip2_dfndr2b")


def published_variant(name: str) -> str | None:
    """The variant behind a published repository or file name; None for any other.

    Args:
        name: `apple/MobileCLIP-S0`, `timm/MobileCLIP2-B-OpenCLIP`, `mobileclip_blt.pt`,
            `./downloads/MobileCLIP2-S0`, and the like.
    """
    path = PurePath(name)
    of_weights = path.suffix in WEIGHT_SUFFIXES
    if is_repository(name) and not of_weights and path.parts[0] not in OWNERS:
        return None  # somebody else's repository: fine-tuned, perhaps otherwise than named
    base = path.stem if of_weights else path.name
    for ending in _PORTS:
        base = base.removesuffix(ending)
    trunk, _, origin = base.partition(".")
    if origin in _ORIGINS:
        variant = TOWERS.get(trunk.lower())
        if variant is None or origin == "apple_mclip2_dfndr2b":
            return variant
        first = variant.replace("MobileCLIP2", "MobileCLIP")
        return variant_named(first + "-LT" * origin.endswith("_lt"))
    return variant_named(base)


def is_port(name: str) -> bool:
    """Whether a published name is of a model of Apple's as open_clip or timm can load it."""
    path = PurePath(name)
    base = path.stem if path.suffix in WEIGHT_SUFFIXES else path.name
    return base.endswith(_PORTS) or base.partition(".")[2] in _ORIGINS
