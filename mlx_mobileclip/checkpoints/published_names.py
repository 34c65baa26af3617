"""Names of the repositories and files of the published models.

Source: open_clip 3.3.0 `pretrained.py`, timm 1.0.31, and the model cards.
"""

from pathlib import PurePath

from ..models.variants import TOWERS, variant_named
from .hub import OWNERS, WEIGHT_SUFFIXES, is_repository

# Ports of Apple's models are named with a suffix, or in timm as tower.tag.
_PORT_SUFFIXES = ("-OpenCLIP", "_timm")
_TIMM_TAGS = ("apple_mclip", "apple_mclip_lt", "apple_mclip2_dfndr2b")


def published_variant(name: str) -> str | None:
    """The variant of a published repository or file; None for any other name.

    Args:
        name: `apple/MobileCLIP-S0`, `timm/MobileCLIP2-B-OpenCLIP`, `mobileclip_blt.pt`,
            `./downloads/MobileCLIP2-S0`, and the like.
    """
    path = PurePath(name)
    is_weights_file = path.suffix in WEIGHT_SUFFIXES
    if is_repository(name) and not is_weights_file and path.parts[0] not in OWNERS:
        return None  # someone else's repository may have changed the model
    base = path.stem if is_weights_file else path.name
    for suffix in _PORT_SUFFIXES:
        base = base.removesuffix(suffix)
    trunk, _, tag = base.partition(".")
    if tag in _TIMM_TAGS:
        variant = TOWERS.get(trunk.lower())
        if variant is None or tag == "apple_mclip2_dfndr2b":
            return variant
        first_generation = variant.replace("MobileCLIP2", "MobileCLIP")
        return variant_named(first_generation + "-LT" * tag.endswith("_lt"))
    return variant_named(base)


def is_port(name: str) -> bool:
    """Whether a published name is that of a port of Apple's model to open_clip or timm."""
    path = PurePath(name)
    base = path.stem if path.suffix in WEIGHT_SUFFIXES else path.name
    return base.endswith(_PORT_SUFFIXES) or base.partition(".")[2] in _TIMM_TAGS
