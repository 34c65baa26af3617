"""Quantised layers: which layers of a model, and how."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from .errors import ConfigError
from .json_fields import Fields

MODES = {  # mode: (bits, group sizes) that MLX implements, the usual ones first
    "affine": ((4, 2, 3, 5, 6, 8), (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}
DEFAULTS = ("bits", "group_size", "mode")  # of all layers, in the `quantization` entry


@dataclass(frozen=True, slots=True)
class Quantization:
    """Quantisation of one layer, in MLX's terms.

    Attributes:
        bits: Bits per weight.
        group_size: Weights that share a scale.
        mode: Number format, one of MODES.
    """

    bits: int = 4
    group_size: int = 64
    mode: str = "affine"

    @classmethod
    def of(
        cls, mode: str = "affine", bits: int | None = None, group_size: int | None = None
    ) -> "Quantization":
        """A quantisation, with the usual values of its mode for what is None.

        Raises:
            ConfigError: MLX does not implement this combination.
        """
        usual_bits, usual_sizes = MODES.get(mode, ((0,), (0,)))
        values = {
            "mode": mode,
            "bits": usual_bits[0] if bits is None else bits,
            "group_size": usual_sizes[0] if group_size is None else group_size,
        }
        return cls.from_json(Fields(values, "quantization"))

    @classmethod
    def from_json(cls, fields: Fields) -> "Quantization":
        """Read and check one entry; raises ConfigError if MLX does not implement it."""
        mode = fields.choice("mode", tuple(MODES), "affine")
        bits, group_sizes = MODES[mode]
        quantization = cls(
            bits=fields.integer("bits", 1, 8),
            group_size=fields.integer("group_size", 1, 1024),
            mode=mode,
        )
        if quantization.bits not in bits:
            allowed = tuple(sorted(bits))
            raise fields.error("bits", f"{quantization.bits} is not one of {allowed} for {mode}")
        if quantization.group_size not in group_sizes:
            allowed = tuple(sorted(group_sizes))
            raise fields.error("group_size", f"{quantization.group_size} is not one of {allowed}")
        return quantization

    def stored_bits(self, dtype: mx.Dtype) -> float:
        """Bits per weight, with its share of the scale and, if affine, of the bias in `dtype`."""
        extra = 2 * 8 * dtype.size if self.mode == "affine" else 8
        return self.bits + extra / self.group_size

    def quantize(self, weight: mx.array) -> dict[str, mx.array]:
        """Quantise a weight: `weight`, `scales` and, if affine, `biases`; lazy."""
        return dict(
            zip(("weight", "scales", "biases"), mx.quantize(weight, **asdict(self)), strict=False)
        )


QuantizedLayers = dict[str, Quantization]  # by the path of the layer in the model


def dequantize(layer: dict[str, mx.array], quantization: Quantization, dtype: mx.Dtype) -> mx.array:
    """The weight of a quantised layer as floats, (rows, width)."""
    return mx.dequantize(
        layer["weight"],
        layer["scales"],
        layer.get("biases"),
        group_size=quantization.group_size,
        bits=quantization.bits,
        mode=quantization.mode,
        dtype=dtype,
    )


def read_quantized_layers(fields: Fields) -> QuantizedLayers:
    """Read the `quantization` entry of a canonical config.json; empty if there is none.

    Its form is mlx-lm's: defaults, and an object for each quantised layer that may override them.
    """
    if not fields.has("quantization"):
        return {}
    entry = fields.object("quantization")
    defaults = {name: entry.values[name] for name in DEFAULTS if name in entry.values}
    paths = [path for path in entry.values if path not in DEFAULTS]
    layers = {path: entry.object(path) for path in paths}
    return {
        path: Quantization.from_json(Fields({**defaults, **layer.values}, layer.where))
        for path, layer in layers.items()
    }


def quantization_entry(layers: QuantizedLayers) -> dict[str, Any]:
    """The `quantization` entry for config.json: the most common values, and those of each layer."""
    most_common, _ = Counter(layers.values()).most_common(1)[0]
    return asdict(most_common) | {path: asdict(how) for path, how in layers.items()}


def choose_layers(
    model: Any, prefixes: dict[str, str], parts: Iterable[str], quantization: Quantization
) -> tuple[QuantizedLayers, list[str]]:
    """Choose the Linear and Embedding layers of some parts, all to be quantised alike.

    Args:
        model: Not quantised yet; its weights are not read.
        prefixes: Prefix of the paths in each part of the model.
        parts: Parts to quantise.
        quantization: How.

    Returns:
        The layers to quantise, and the paths of those whose width is not a multiple of the group.

    Raises:
        ConfigError: the model is quantised already, or has no such part or no such layer.
    """
    parts = tuple(parts)
    if model.config.quantization:
        raise ConfigError("the model is quantised already; take the original, or --dequantize it")
    if unknown := [part for part in parts if part not in prefixes]:
        raise ConfigError(f"no part is called {unknown[0]!r}; there are {', '.join(prefixes)}")
    chosen: QuantizedLayers = {}
    skipped: list[str] = []
    inside = tuple(prefixes[part] for part in parts)
    for path, layer in model.named_modules():
        if path.startswith(inside) and hasattr(layer, "to_quantized"):
            if layer.weight.shape[-1] % quantization.group_size:
                skipped.append(path)
            else:
                chosen[path] = quantization
    if not chosen:
        raise ConfigError(
            f"no layer of {', '.join(parts)} is a multiple of {quantization.group_size} wide; "
            "choose another --q-group-size"
        )
    return chosen, sorted(skipped)


def quantize_layers(model: nn.Module, layers: QuantizedLayers, *, evaluate: bool = False) -> None:
    """Replace layers by quantised ones.

    Args:
        model: Changed in place.
        layers: Which layers, and how.
        evaluate: Evaluate one layer after another, so that only one is held twice.

    Raises:
        ConfigError: there is no such layer, or its width is not a multiple of the group.
    """
    modules = dict(model.named_modules())
    for path, quantization in layers.items():
        layer: Any = modules.get(path)
        if not hasattr(layer, "to_quantized"):
            raise ConfigError(f"quantization: {path[:80]!r} is not a layer that can be quantised")
        if layer.weight.shape[-1] % quantization.group_size:
            raise ConfigError(
                f"quantization: {path} is {layer.weight.shape[-1]} wide, not a multiple of "
                f"group_size {quantization.group_size}"
            )
        quantized = layer.to_quantized(**asdict(quantization))
        quantized.train(layer.training)
        if evaluate:
            mx.eval(quantized.parameters())
        model.update_modules(tree_unflatten([(path, quantized)]))


def quantize_parts(
    model: Any, prefixes: dict[str, str], parts: Iterable[str], quantization: Quantization
) -> list[str]:
    """Quantise parts of a loaded model in place, and record it in its config.

    Args:
        model: With a `config` that has a field `quantization`.
        prefixes: Prefix of the paths in each part of the model.
        parts: Parts to quantise.
        quantization: How.

    Returns:
        Paths of the layers whose width is not a multiple of the group; they stay as they are.

    Raises:
        ConfigError: the model is quantised already, or has no such part.
    """
    layers, skipped = choose_layers(model, prefixes, parts, quantization)
    quantize_layers(model, layers, evaluate=True)
    model.config = replace(model.config, quantization=layers)
    return skipped
