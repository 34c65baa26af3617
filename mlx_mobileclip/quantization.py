"""Which layers of a model are packed into few bits, and how."""

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


@dataclass(frozen=True, slots=True)
class Quantization:
    """How one layer is packed; MLX's modes, bits per weight, weights per scale."""

    bits: int = 4
    group_size: int = 64
    mode: str = "affine"

    @classmethod
    def of(
        cls, mode: str = "affine", bits: int | None = None, group_size: int | None = None
    ) -> "Quantization":
        """A packing with what is usual for its mode where nothing is given.

        Raises:
            ConfigError: MLX has no such packing.
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
        """Read and check one entry; raises ConfigError when MLX has no such packing."""
        mode = fields.choice("mode", tuple(MODES), "affine")
        bits, group_sizes = MODES[mode]
        packing = cls(
            bits=fields.integer("bits", 1, 8),
            group_size=fields.integer("group_size", 1, 1024),
            mode=mode,
        )
        if packing.bits not in bits:
            allowed = tuple(sorted(bits))
            raise fields.error("bits", f"{packing.bits} is not one of {allowed} for {mode}")
        if packing.group_size not in group_sizes:
            allowed = tuple(sorted(group_sizes))
            raise fields.error("group_size", f"{packing.group_size} is not one of {allowed}")
        return packing

    def stored_bits(self, dtype: mx.Dtype) -> float:
        """Bits per weight with its share of a scale and, if affine, an offset, of this dtype."""
        extra = 2 * 8 * dtype.size if self.mode == "affine" else 8
        return self.bits + extra / self.group_size

    def pack(self, weight: mx.array) -> dict[str, mx.array]:
        """Lazy tensors of a packed layer by their names in it."""
        return dict(
            zip(("weight", "scales", "biases"), mx.quantize(weight, **asdict(self)), strict=False)
        )


Packed = dict[str, Quantization]  # by the layer's path in the model


def unpack(layer: dict[str, mx.array], packing: Quantization, dtype: mx.Dtype) -> mx.array:
    """The weight of a packed layer, floats (rows, width)."""
    return mx.dequantize(
        layer["weight"],
        layer["scales"],
        layer.get("biases"),
        group_size=packing.group_size,
        bits=packing.bits,
        mode=packing.mode,
        dtype=dtype,
    )


def read_packed(fields: Fields) -> Packed:
    """The `quantization` entry of a canonical config.json; empty where there is none."""
    if not fields.has("quantization"):
        return {}
    entry = fields.object("quantization")
    return {path: Quantization.from_json(entry.object(path)) for path in entry.values}


def choose(
    model: Any, prefixes: dict[str, str], parts: Iterable[str], packing: Quantization
) -> tuple[Packed, list[str]]:
    """Which layers to pack, each alike.

    Args:
        model: Not packed yet; its weights are not looked at.
        prefixes: Where each of its parts lies.
        parts: Which of them.
        packing: For each of their Linear and Embedding layers.

    Returns:
        The layers to pack, and the paths of those whose width no group divides.

    Raises:
        ConfigError: the model is packed already, has no such part, or no layer that fits.
    """
    parts = tuple(parts)
    if model.config.quantization:
        raise ConfigError("the model is quantised already; take the original, or --dequantize it")
    if unknown := [part for part in parts if part not in prefixes]:
        raise ConfigError(f"no part is called {unknown[0]!r}; there are {', '.join(prefixes)}")
    chosen: Packed = {}
    skipped: list[str] = []
    inside = tuple(prefixes[part] for part in parts)
    for path, layer in model.named_modules():
        if path.startswith(inside) and hasattr(layer, "to_quantized"):
            if layer.weight.shape[-1] % packing.group_size:
                skipped.append(path)
            else:
                chosen[path] = packing
    if not chosen:
        raise ConfigError(
            f"no layer of {', '.join(parts)} is a multiple of {packing.group_size} wide; "
            "choose another --q-group-size"
        )
    return chosen, sorted(skipped)


def pack(model: nn.Module, packed: Packed, *, evaluate: bool = False) -> None:
    """Replace layers by packed ones.

    Args:
        model: Changed in place.
        packed: Which layers, and how.
        evaluate: Do each at once, so that no more than one is held twice.

    Raises:
        ConfigError: there is no such layer, or no group divides its width.
    """
    layers = dict(model.named_modules())
    for path, packing in packed.items():
        layer: Any = layers.get(path)
        if not hasattr(layer, "to_quantized"):
            raise ConfigError(f"quantization: {path[:80]!r} is no layer that can be packed")
        if layer.weight.shape[-1] % packing.group_size:
            raise ConfigError(
                f"quantization: {path} is {layer.weight.shape[-1]} wide, no multiple of "
                f"group_size {packing.group_size}"
            )
        quantized = layer.to_quantized(**asdict(packing))
        quantized.train(layer.training)
        if evaluate:
            mx.eval(quantized.parameters())
        model.update_modules(tree_unflatten([(path, quantized)]))


def quantize_parts(
    model: Any, prefixes: dict[str, str], parts: Iterable[str], packing: Quantization
) -> list[str]:
    """Pack parts of a loaded model in place, and say so in its config.

    Args:
        model: With a `config` that has a field `quantization`.
        prefixes: Where each of its parts lies.
        parts: Which of them.
        packing: How.

    Returns:
        Paths of the layers whose width no group divides; they stay as they are.

    Raises:
        ConfigError: the model is packed already, or has no such part.
    """
    packed, skipped = choose(model, prefixes, parts, packing)
    pack(model, packed, evaluate=True)
    model.config = replace(model.config, quantization=packed)
    return skipped
