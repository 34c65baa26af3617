"""Under which names of repositories and files the published models are found.

Source: open_clip 3.3.0 `pretrained.py`, timm 1.0.31, and the model cards.
"""

from pathlib import PurePath

from ..models.variants import plain, variant_named
from .hub import WEIGHT_SUFFIXES, is_repository

# timm's names of the image towers published with MobileCLIP2.
_TRUNKS = {
    "fastvitmci0": "MobileCLIP2-S0",
    "fastvitmci2": "MobileCLIP2-S2",
    "vitbasemci224": "MobileCLIP2-B",
    "fastvitmci3": "MobileCLIP2-S3",
    "fastvitmci4": "MobileCLIP2-S4",
}
_OWNERS = ("apple", "timm")


def published_variant(name: str) -> str | None:
    """The variant behind a published repository or file name; None for any other.

    Args:
        name: `apple/MobileCLIP-S0`, `timm/MobileCLIP2-B-OpenCLIP`, `mobileclip_blt.pt`,
            `./downloads/MobileCLIP2-S0`, and the like.
    """
    path = PurePath(name)
    of_weights = path.suffix in WEIGHT_SUFFIXES
    if is_repository(name) and not of_weights and path.parts[0] not in _OWNERS:
        return None  # somebody else's repository: fine-tuned, perhaps otherwise than named
    base = path.stem if of_weights else path.name
    for ending in ("-OpenCLIP", "_timm"):
        base = base.removesuffix(ending)
    trunk, _, origin = base.partition(".")
    if origin == "apple_mclip2_dfndr2b":
        return _TRUNKS.get(plain(trunk))
    return variant_named(base)
