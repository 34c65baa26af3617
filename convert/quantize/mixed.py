"""Mixed quantisation: more bits for the layers whose rounding changes the outputs most.

The layers of one module, such as a decoder layer's attention, are a unit with one number of bits.
Each unit is rounded separately, and the outputs on calibration samples are compared with the
original's. Bits are then added step by step to the unit with the largest gain per bit, until the
budget is spent.
"""

from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mobileclip.checkpoints.weights import named_parameters
from mlx_mobileclip.errors import ConfigError
from mlx_mobileclip.quantization import MODES, Quantization, QuantizedLayers
from mlx_mobileclip.terminal import Bar

from ..calibration import Sample
from ..verify.stages import IMAGES, LOGITS, TEXTS, UNROUNDED, Read, RunStages, Units
from .quality import divergence

FLOAT = 16  # means "not quantised" in BITS
BITS = (*sorted(MODES["affine"][0]), FLOAT)
TRIAL_BITS = 4  # for measuring the sensitivity of a unit
EXTRA_BITS = 0.5  # default budget, per weight
HEADER_BYTES = 256  # upper bound per tensor in a safetensors file


def group_by_module(quantized: QuantizedLayers) -> Units:
    """Group layers by the module that contains them."""
    units: Units = defaultdict(dict)
    for path, quantization in quantized.items():
        units[path.rpartition(".")[0]][path] = quantization
    return dict(units)


def sensitivities(
    run_stages: RunStages, read: Read, quantized: QuantizedLayers, samples: list[Sample], bar: Bar
) -> dict[str, float]:
    """Measure how much outputs change when one unit is rounded to TRIAL_BITS.

    Args:
        run_stages: Runs a model of this architecture.
        read: Reads the source.
        quantized: Layers to quantise.
        samples: Calibration samples.
        bar: Advanced by one for each unit.

    Returns:
        By unit, for FastVLM the mean Kullback-Leibler divergence of the next token in nats, for
        MobileCLIP the mean of 1 - cosine over images and texts.
    """
    units = group_by_module(
        {path: replace(quantization, bits=TRIAL_BITS) for path, quantization in quantized.items()}
    )
    references: dict[str, list[mx.array]] = defaultdict(list)
    changes: dict[str, list[float]] = {}
    compared: Counter[tuple[str, str]] = Counter()
    for stage, unit, value in run_stages(read, units, samples):
        if unit != UNROUNDED and unit not in changes:
            changes[unit] = []
            bar.advance(1)
        if stage not in (LOGITS, IMAGES, TEXTS):
            continue
        if unit == UNROUNDED:
            references[stage].append(value)
            continue
        reference = references[stage][compared[stage, unit]]
        compared[stage, unit] += 1
        if stage == LOGITS:
            change = divergence(reference, value)
        else:
            change = 1 - mx.sum(reference * value, axis=-1)
        changes[unit].append(float(np.array(mx.mean(change))))
    return {unit: max(0.0, sum(values) / len(values)) for unit, values in changes.items()}


def allocate_bits(
    costs: dict[str, float],
    weights: dict[str, int],
    quantization: Quantization,
    budget: float,
    dtype: mx.Dtype,
) -> dict[str, int]:
    """Choose the bits of each unit, at least those of `quantization`.

    Rounding errors are proportional to the step between two values, and the divergence to their
    square: one more bit halves the steps and leaves a quarter of the divergence.

    Args:
        costs: From `sensitivities`.
        weights: Number of weights of each unit.
        quantization: Initial quantisation of all units.
        budget: Bits that may be added.
        dtype: dtype of weights that are not quantised, and of scales.

    Returns:
        One of BITS for each unit.
    """

    def stored_bits(bits: int) -> float:
        if bits == FLOAT:
            return 8 * dtype.size
        return replace(quantization, bits=bits).stored_bits(dtype)

    def cost(unit: str, bits: int) -> float:
        if bits == FLOAT:
            return 0
        return costs[unit] * ((2**TRIAL_BITS - 1) / (2**bits - 1)) ** 2

    bits = dict.fromkeys(costs, quantization.bits)
    while True:
        gains = {}
        for unit, now in bits.items():
            if now == FLOAT:
                continue
            higher = BITS[BITS.index(now) + 1]
            price = weights[unit] * (stored_bits(higher) - stored_bits(now))
            if price <= budget:
                gains[unit] = ((cost(unit, now) - cost(unit, higher)) / price, higher, price)
        if not gains:
            return bits
        best = max(gains, key=lambda unit: gains[unit][0])
        _, bits[best], price = gains[best]
        budget -= price


def bit_budget(
    model: Any, quantized: QuantizedLayers, dtype: mx.Dtype, max_bytes: int | None
) -> float:
    """Return the bits that may be added to layers that all have the fewest bits.

    Args:
        model: Not quantised; its weights are never read.
        quantized: Layers to quantise, with the fewest bits that they may have.
        dtype: dtype of all other weights.
        max_bytes: Size limit of the weight files; None for EXTRA_BITS per weight.

    Raises:
        ConfigError: the weights are larger even with the fewest bits.
    """
    sizes = {name: array.size for name, array in named_parameters(model).items()}
    chosen = {path: sizes.pop(f"{path}.weight") for path in quantized}
    if max_bytes is None:
        return EXTRA_BITS * sum(chosen.values())
    least = sum(quantized[path].stored_bits(dtype) * size for path, size in chosen.items())
    least += 8 * (dtype.size * sum(sizes.values()) + HEADER_BYTES * (len(sizes) + 3 * len(chosen)))
    if least > 8 * max_bytes:
        raise ConfigError(
            f"--max-size {max_bytes / 1e6:.1f}MB: the weights take {least / 8e6:.1f} MB even at "
            f"{min(entry.bits for entry in quantized.values())} bits; allow more, or fewer "
            "--q-bits or more --q-parts"
        )
    return 8 * max_bytes - least


def mixed_quantization(
    model: Any, quantized: QuantizedLayers, dtype: mx.Dtype, costs: dict[str, float], budget: float
) -> QuantizedLayers:
    """Distribute a budget of bits over the layers.

    Args:
        model: Not quantised; its weights are never read.
        quantized: Layers to quantise, all with the fewest bits.
        dtype: dtype of all other weights.
        costs: From `sensitivities`.
        budget: From `bit_budget`.

    Returns:
        Quantisation of each layer; layers that stay floats are left out.
    """
    units = group_by_module(quantized)
    sizes = {name: array.size for name, array in named_parameters(model).items()}
    weights = {unit: sum(sizes[f"{path}.weight"] for path in units[unit]) for unit in units}
    bits = allocate_bits(costs, weights, next(iter(quantized.values())), budget, dtype)
    return {
        path: replace(quantization, bits=bits[unit])
        for unit, layers in units.items()
        for path, quantization in layers.items()
        if bits[unit] != FLOAT
    }
