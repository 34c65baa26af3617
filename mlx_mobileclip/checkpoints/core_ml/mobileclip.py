"""MobileCLIP from two Core ML packages, as in apple/coreml-mobileclip.

A package is named after the variant and the tower, `mobileclip_s2_image.mlpackage`.
"""

import math
import re
from collections.abc import Iterable

import mlx.core as mx

from ...errors import CheckpointError, ConfigError
from ...models.clip import MobileCLIPConfig
from ...models.variants import variant_named
from ..hub import Checkpoint, fetch_package, packages_here, packages_on_the_hub
from ..layout import Layout
from .package import SUFFIX
from .towers import read_image_tower, read_text_tower

PACKAGE_NAME = re.compile(r"(.+)_(image|text)" + re.escape(SUFFIX))
LAYOUT = Layout("Core ML", {"image": "image.", "text": "text."}, apple=False)
# Packages hold only the towers. Training clips the factor at 100, which Apple's examples use.
LOGIT_SCALE = math.log(100)

Towers = dict[str, str]  # name of the package of "image" and of "text"


def packages_by_variant(names: Iterable[str]) -> dict[str, Towers]:
    """The packages of published models by variant; others are left out."""
    found: dict[str, Towers] = {}
    for name in names:
        match = PACKAGE_NAME.fullmatch(name)
        variant = variant_named(match[1]) if match else None
        if match and variant:
            found.setdefault(variant, {})[match[2]] = name
    return found


def find_towers(checkpoint: Checkpoint, variant: str | None) -> tuple[str, Towers] | None:
    """Which packaged variant of a checkpoint to read, and the names of its packages.

    Args:
        checkpoint: Where to look.
        variant: The variant asked for; by default the only one there is.

    Returns:
        None if the checkpoint has no such packages.

    Raises:
        CheckpointError: there are no packages of the variant, but of others.
        ConfigError: there are several, and none is asked for.
    """
    if not checkpoint.path.is_dir():
        return None
    if checkpoint.path.suffix == SUFFIX:
        raise CheckpointError(
            f"{checkpoint.name}: is the package of one tower; give the directory that holds both"
        )
    wanted = variant_named(variant) if variant is not None else None
    found = packages_by_variant(packages_here(checkpoint))
    if wanted is None or len(found.get(wanted, {})) < len(LAYOUT.prefixes):
        # The Hub may have packages that were not fetched before.
        on_the_hub = packages_on_the_hub(checkpoint.name, checkpoint.revision)
        found = packages_by_variant({*packages_here(checkpoint), *on_the_hub})
    if not found or (variant is not None and wanted is None):
        return None  # an unknown variant is reported as for any checkpoint
    names = ", ".join(sorted(found))
    if wanted is None:
        if len(found) > 1:
            raise ConfigError(
                f"{checkpoint.name}: has Core ML packages of {names}; choose one with --variant "
                "(variant= in Python)"
            )
        wanted = next(iter(found))
    if wanted not in found:
        raise CheckpointError(f"{checkpoint.name}: has no package of {wanted}, only of {names}")
    return wanted, found[wanted]


def read_towers(
    checkpoint: Checkpoint, towers: Towers, config: MobileCLIPConfig
) -> dict[str, mx.array]:
    """The tensors of both packages in `LAYOUT`, fetched if need be.

    Raises:
        CheckpointError: a package cannot be had, is damaged, or holds another tower.
    """
    tensors: dict[str, mx.array] = {}
    for part in LAYOUT.prefixes:
        path = fetch_package(checkpoint, towers[part]) if part in towers else None
        if path is None:
            raise CheckpointError(
                f"{checkpoint.name}: the package of {config.variant}'s {part} tower is missing; "
                "put it beside the other one"
            )
        where, width = f"{checkpoint.name}: {towers[part]}", config.embed_dim
        if part == "image":
            read = read_image_tower(path, where, config.image, width)
        else:
            assert config.text is not None
            read = read_text_tower(path, where, config.text, width)
        tensors |= {f"{part}.{key}": tensor for key, tensor in read.items()}
    return tensors | {"logit_scale": mx.array(LOGIT_SCALE, mx.float32)}
