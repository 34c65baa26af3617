"""Padding of attention heads on Metal."""

import os

from ..errors import ModelError

PAD_HEADS_FROM = 512  # positions; estimated from bytes and FLOPs, measured by `bench mac`


def pad_heads_from() -> int:
    """Minimum sequence length at which heads of width 32 are padded to 64 on Metal.

    MLX's fused attention supports heads of width 64 but not 32. For long
    sequences, not storing the scores saves more time than the doubled arithmetic costs.

    Returns:
        $MLX_MOBILECLIP_PAD_HEADS_FROM if it is set, or 512.

    Raises:
        ModelError: it is not a number.
    """
    value = os.environ.get("MLX_MOBILECLIP_PAD_HEADS_FROM")
    if not value:
        return PAD_HEADS_FROM
    if not value.isdecimal() or len(value) > 9:
        raise ModelError(
            f"MLX_MOBILECLIP_PAD_HEADS_FROM is {value[:20]!r}; set it to a number of positions, "
            f"such as {PAD_HEADS_FROM}, or not at all"
        )
    return int(value)
