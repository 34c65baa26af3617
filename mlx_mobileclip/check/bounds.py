"""Upper bounds of the rounding errors, by the precision of the device."""

from typing import NamedTuple

import mlx.core as mx

from ..device import dtype_name
from .machine import Machine


class Bounds(NamedTuple):
    """Upper bounds for `relative_error`.

    Attributes:
        part: For one layer or operation, given the same input as the reference.
        logits: For the logits of a whole model.
    """

    part: float
    logits: float


# Five times the largest error measured on a CPU (AMD EPYC, MLX 0.32.4, 2026-11-27), of the demo
# models and of random weights at full width (FastViTHD, Qwen2 0.5B, ViT-B, MCi0, text towers).
# Parts: 3.4e-6 in float32 and 1.4e-3 in float16; bfloat16, with three bits less, has 8 times as
# much as float16 (6.6e-3 on the demo models). Logits: 2.8e-6, 2.8e-3 and 2.7e-2.
# A GPU may compute products of float32 as TF32, with the 10 bits of float16, and Metal's rotary
# positions use a fast sine, so float32 has the bounds of float16 there. Metal's depthwise
# convolutions round each product to half, which was emulated: at most 7 % more error.
BOUNDS = {
    "float32": Bounds(1.7e-5, 1.4e-5),
    "float32 on a GPU": Bounds(7e-3, 1.4e-2),
    "float16": Bounds(7e-3, 1.4e-2),
    "bfloat16": Bounds(5.6e-2, 1.4e-1),
}


def bounds(dtype: mx.Dtype, machine: Machine) -> Bounds:
    """The bounds for a dtype on a machine."""
    on_gpu = dtype == mx.float32 and machine.backend != "cpu"
    return BOUNDS["float32 on a GPU" if on_gpu else dtype_name(dtype)]
