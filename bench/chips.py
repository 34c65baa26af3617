"""Peak performance of the GPUs of Apple chips.

Bandwidths, core counts, and the TFLOPS of M1 and M2 are Apple's (newsroom, chip by chip). TFLOPS
per core of the M3 are from Hugging Face's list of hardware (14.2 TFLOPS for the M3 Max); for M4 and
M5 figures differ by a tenth (M4 Max: 16.2 to 18.4). Each core of an M5 has matrix units of 1024
half-precision FLOP per cycle, four times its other units: 16.4 TFLOPS for the M5.
"""

from dataclasses import dataclass

_TFLOPS_PER_CORE = {"m1": 0.325, "m2": 0.358, "m3": 0.355, "m4": 0.4125, "m5": 0.42}
_MATRIX_TFLOPS_PER_CORE = _TFLOPS_PER_CORE | {"m5": 1.64}
_CORES_AND_BANDWIDTH = {  # GB/s; of the largest GPU sold under each name
    "m1": (8, 68.25),
    "m1-pro": (16, 200),
    "m1-max": (32, 400),
    "m1-ultra": (64, 800),
    "m2": (10, 100),
    "m2-pro": (19, 200),
    "m2-max": (38, 400),
    "m2-ultra": (76, 800),
    "m3": (10, 100),
    "m3-pro": (18, 150),
    "m3-max": (40, 400),
    "m3-ultra": (80, 819),
    "m4": (10, 120),
    "m4-pro": (20, 273),
    "m4-max": (40, 546),
    "m5": (10, 153.6),
    "m5-pro": (20, 307),
    "m5-max": (40, 614),
}


@dataclass(frozen=True, slots=True)
class Chip:
    """Limits of a GPU, in half precision.

    Attributes:
        bandwidth: Memory bandwidth, bytes per second.
        flops: FLOP per second, except in matrix products.
        matrix_flops: FLOP per second in matrix products; more than `flops` with matrix units.
    """

    bandwidth: float
    flops: float
    matrix_flops: float


def _chip(name: str, cores: int, bandwidth: float) -> Chip:
    generation = name[:2]
    return Chip(
        bandwidth=bandwidth * 1e9,
        flops=cores * _TFLOPS_PER_CORE[generation] * 1e12,
        matrix_flops=cores * _MATRIX_TFLOPS_PER_CORE[generation] * 1e12,
    )


CHIPS = {name: _chip(name, *figures) for name, figures in _CORES_AND_BANDWIDTH.items()}
