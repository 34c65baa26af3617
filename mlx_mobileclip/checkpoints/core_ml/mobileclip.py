"""Read MobileCLIP from two Core ML packages, as in apple/coreml-mobileclip.

A package is named after the variant and the tower, `mobileclip_s2_image.mlpackage`.
"""

import math
import re
from collections.abc import Iterable

import mlx.core as mx

from ...errors import CheckpointError, ConfigError
from ...models.clip import MobileCLIPConfig
from ...models.variants import variant_named
from ..hub import Checkpoint, fetch_package, hub_packages, local_packages
from ..layout import Layout
from .package import SUFFIX
from .towers import read_image_tower, read_text_tower

PACKAGE_NAME = re.compile(r"(.+)_(image|text)" + re.escape(SUFFIX))
LAYOUT = Layout("Core ML", {"image": "image.", "text": "text."}, apple=False)
# Packages have only the towers. Training clips the scale at 100, the value in Apple's examples.
LOGIT_SCALE = math.log(100)

Towers = dict[str, str]  # "image" and "text": name of the package


def packages_by_variant(names: Iterable[str]) -> dict[str, Towers]:
    """Group the packages of published models by variant; others are ignored."""
    packages: dict[str, Towers] = {}
    for name in names:
        match = PACKAGE_NAME.fullmatch(name)
        variant = variant_named(match[1]) if match else None
        if match and variant:
            packages.setdefault(variant, {})[match[2]] = name
    return packages


def find_towers(checkpoint: Checkpoint, variant: str | None) -> tuple[str, Towers] | None:
    """Choose the variant to read from a checkpoint's packages, and the names of its packages.

    Args:
        checkpoint: Checkpoint to search.
        variant: Requested variant; by default the only one there is.

    Returns:
        None if the checkpoint has no such packages.

    Raises:
        CheckpointError: there are only packages of other variants.
        ConfigError: there are several variants, and none is requested.
    """
    if not checkpoint.path.is_dir():
        return None
    if checkpoint.path.suffix == SUFFIX:
        raise CheckpointError(
            f"{checkpoint.name}: is the package of one tower; give the directory that holds both"
        )
    requested = variant_named(variant) if variant is not None else None
    local = local_packages(checkpoint)
    packages = packages_by_variant(local)
    if requested is None or len(packages.get(requested, {})) < len(LAYOUT.prefixes):
        # The Hub may have packages that are not downloaded yet.
        on_hub = hub_packages(checkpoint.name, checkpoint.revision)
        packages = packages_by_variant({*local, *on_hub})
    if not packages or (variant is not None and requested is None):
        return None  # an unknown variant is reported as for any checkpoint
    names = ", ".join(sorted(packages))
    if requested is None:
        if len(packages) > 1:
            raise ConfigError(
                f"{checkpoint.name}: has Core ML packages of {names}; choose one with --variant "
                "(variant= in Python)"
            )
        requested = next(iter(packages))
    if requested not in packages:
        raise CheckpointError(f"{checkpoint.name}: has no package of {requested}, only of {names}")
    return requested, packages[requested]


def read_towers(
    checkpoint: Checkpoint, towers: Towers, config: MobileCLIPConfig
) -> dict[str, mx.array]:
    """Read the tensors of both packages in `LAYOUT`, downloading them if necessary.

    Raises:
        CheckpointError: a package is missing, damaged, or of another tower.
    """
    tensors: dict[str, mx.array] = {}
    for part in LAYOUT.prefixes:
        path = fetch_package(checkpoint, towers[part]) if part in towers else None
        if path is None:
            raise CheckpointError(
                f"{checkpoint.name}: the package of {config.variant}'s {part} tower is missing; "
                "put it next to the other one"
            )
        where, width = f"{checkpoint.name}: {towers[part]}", config.embed_dim
        if part == "image":
            read = read_image_tower(path, where, config.image, width)
        else:
            assert config.text is not None
            read = read_text_tower(path, where, config.text, width)
        tensors |= {f"{part}.{key}": tensor for key, tensor in read.items()}
    return tensors | {"logit_scale": mx.array(LOGIT_SCALE, mx.float32)}
