"""Which layers get how many bits: more where rounding them costs the answers more.

Each unit, the layers of one module such as a decoder layer's attention, is rounded alone and the
model's outputs compared with the original's on calibration pictures. Bits then go, one step at a
time, to where a byte more saves most, until there is no room left.
"""

import re
from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mobileclip.checkpoint import named_parameters
from mlx_mobileclip.command import Bar
from mlx_mobileclip.errors import ConfigError
from mlx_mobileclip.quantization import MODES, Packed, Quantization

from .calibration import Sample
from .quality import divergence
from .walk import IMAGES, LOGITS, NONE, TEXTS, Read, Units, Walk

WHOLE = 16  # in the place of bits: not packed
STEPS = (*sorted(MODES["affine"][0]), WHOLE)
PROBE_BITS = 4  # what units are rounded to, to find how much each matters
EXTRA_BITS = 0.5  # per weight, that a mixed recipe may spend above a uniform one
HEADER_BYTES = 256  # of a file for each tensor in it, at most
SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMG]?)B?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of a size such as 400MB or 1.5G; raises ConfigError."""
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"--max-size {text[:40]}: is no size; write it like 400MB or 1.5GB")
    return int(float(match[1]) * 1000 ** " KMG".index(match[2].upper() or " "))


def units_of(packed: Packed) -> Units:
    """Layers grouped by the module that holds them."""
    units: Units = defaultdict(dict)
    for path, packing in packed.items():
        units[path.rpartition(".")[0]][path] = packing
    return dict(units)


def sensitivities(
    walk: Walk, original: Read, packed: Packed, samples: list[Sample], bar: Bar
) -> dict[str, float]:
    """How far the model's outputs move when one unit alone is rounded to PROBE_BITS, by unit.

    Args:
        walk: Through the kind of model that it is.
        original: Reads it.
        packed: Layers that are to be packed.
        samples: To measure it on.
        bar: Told of each unit that was rounded.

    Returns:
        Of FastVLM the mean divergence of the next token's distribution, nats; of MobileCLIP the
        mean of 1 - cosine over images and texts.
    """
    units = units_of({path: replace(how, bits=PROBE_BITS) for path, how in packed.items()})
    references: dict[str, list[mx.array]] = defaultdict(list)
    moved: dict[str, list[float]] = {}
    compared: Counter[tuple[str, str]] = Counter()
    for stage, unit, value in walk(original, units, samples):
        if unit != NONE and unit not in moved:
            moved[unit] = []
            bar.advance(1)
        if stage not in (LOGITS, IMAGES, TEXTS):
            continue
        if unit == NONE:
            references[stage].append(value)
            continue
        reference = references[stage][compared[stage, unit]]
        compared[stage, unit] += 1
        if stage == LOGITS:
            moves = divergence(reference, value)
        else:
            moves = 1 - mx.sum(reference * value, axis=-1)
        moved[unit].append(float(np.array(mx.mean(moves))))
    return {unit: max(0.0, sum(values) / len(values)) for unit, values in moved.items()}


def allot(
    costs: dict[str, float],
    weights: dict[str, int],
    packing: Quantization,
    room: float,
    dtype: mx.Dtype,
) -> dict[str, int]:
    """Bits of each unit, from those of `packing` up.

    Rounding errors are as large as the steps between values, and the divergence they cause grows
    with their square: halving the steps, which is what one more bit does, leaves a quarter.

    Args:
        costs: What rounding each unit to PROBE_BITS costs.
        weights: How many each has.
        packing: Of all, to begin with.
        room: Bits that may be spent beyond it.
        dtype: Of weights that are not packed, and of scales.

    Returns:
        One of STEPS for each unit.
    """

    def stored(bits: int) -> float:
        if bits == WHOLE:
            return 8 * dtype.size
        return replace(packing, bits=bits).stored_bits(dtype)

    def cost(unit: str, bits: int) -> float:
        return 0 if bits == WHOLE else costs[unit] * ((2**PROBE_BITS - 1) / (2**bits - 1)) ** 2

    bits = dict.fromkeys(costs, packing.bits)
    while True:
        gains = {}
        for unit, now in bits.items():
            if now == WHOLE:
                continue
            higher = STEPS[STEPS.index(now) + 1]
            price = weights[unit] * (stored(higher) - stored(now))
            if price <= room:
                gains[unit] = ((cost(unit, now) - cost(unit, higher)) / price, higher, price)
        if not gains:
            return bits
        best = max(gains, key=lambda unit: gains[unit][0])
        _, bits[best], price = gains[best]
        room -= price


def room(model: Any, packed: Packed, dtype: mx.Dtype, max_bytes: int | None) -> float:
    """Bits that may be spent beyond what packing takes.

    Args:
        model: Not packed; its weights are not looked at.
        packed: Layers and the fewest bits they may have.
        dtype: Of all other weights.
        max_bytes: That the files of weights may take; None for EXTRA_BITS a packed weight.

    Raises:
        ConfigError: they take more even with the fewest bits.
    """
    sizes = {name: array.size for name, array in named_parameters(model).items()}
    inside = {path: sizes.pop(f"{path}.weight") for path in packed}
    if max_bytes is None:
        return EXTRA_BITS * sum(inside.values())
    least = sum(packed[path].stored_bits(dtype) * size for path, size in inside.items())
    least += 8 * (dtype.size * sum(sizes.values()) + HEADER_BYTES * (len(sizes) + 3 * len(inside)))
    if least > 8 * max_bytes:
        raise ConfigError(
            f"--max-size {max_bytes / 1e6:.1f}MB: the weights take {least / 8e6:.1f} MB even at "
            f"{min(how.bits for how in packed.values())} bits; allow more, or fewer --q-bits or "
            "more --q-parts"
        )
    return 8 * max_bytes - least


def mixed(
    model: Any, packed: Packed, dtype: mx.Dtype, costs: dict[str, float], room: float
) -> Packed:
    """The same layers with more bits where they are worth most; some may not be packed at all."""
    units = units_of(packed)
    sizes = {name: array.size for name, array in named_parameters(model).items()}
    weights = {unit: sum(sizes[f"{path}.weight"] for path in units[unit]) for unit in units}
    bits = allot(costs, weights, next(iter(packed.values())), room, dtype)
    return {
        path: replace(how, bits=bits[unit])
        for unit, layers in units.items()
        for path, how in layers.items()
        if bits[unit] != WHOLE
    }
