"""Damaged and odd Core ML packages are read, or refused quickly in one line."""

import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attacks import put
from core_ml_file import MODEL, WEIGHTS, tensor_type
from core_ml_file import put as field
from core_ml_towers import TowerProgram, fastvit, tiny_fastvithd, write_app_export
from synthetic import TINY_DIMS, TINY_LAYERS

from mlx_mobileclip.checkpoints.core_ml.towers import read_image_tower
from mlx_mobileclip.errors import CheckpointError
from mlx_mobileclip.models.fastvit import PRESETS

PACKAGE = "fastvithd.mlpackage"
TOWER_CONFIG = replace(PRESETS["fastvithd"], layers=TINY_LAYERS, embed_dims=TINY_DIMS)


def is_refused(path: Path) -> bool:
    """Read a package; returns whether it was refused, quickly and in one line."""
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constants that nothing uses
        try:
            read_image_tower(path, "case", TOWER_CONFIG)
        except CheckpointError as error:
            assert str(error).startswith("case: ")
            return True
        finally:
            assert time.perf_counter() - started < 5
    return False


def test_damaged_packages_never_crash(tmp_path: Path) -> None:
    """Truncated or with flipped bits, a package is refused quickly or read."""
    path = write_app_export(tmp_path) / PACKAGE
    parts = {part: (path / part).read_bytes() for part in (MODEL, WEIGHTS)}
    rng = np.random.default_rng(0)
    refused = 0
    for i in range(150):
        part = MODEL if i % 3 else WEIGHTS
        damaged = bytearray(parts[part])
        if i % 4:
            last = len(damaged) if i % 2 else 4000  # most of weight.bin is values
            for position in rng.integers(0, last, 1 + i % 5):
                damaged[position] ^= 1 << int(rng.integers(8))
        else:
            del damaged[int(rng.integers(len(damaged))) :]
        put(path / part, bytes(damaged))
        refused += is_refused(path)
        put(path / part, parts[part])
    assert refused > 75


class OddTower(TowerProgram):
    """Gives one parameter of the first layer of a kind an odd value, or leaves it out."""

    def __init__(self, tensors: Any, kind: str, parameter: str, value: Any):
        super().__init__(tensors)
        self.kind, self.parameter, self.value_ = kind, parameter, value

    def op(self, kind: str, shape: tuple[int, ...] = (), **parameters: Any) -> str:
        if kind == self.kind and self.parameter in parameters:
            self.kind = ""
            parameters[self.parameter] = self.value_
            if self.value_ is None:
                del parameters[self.parameter]
        return super().op(kind, shape, **parameters)


EMPTY = field(2, tensor_type(11, (0,))) + field(3, field(1, field(1, b"")))
LIST = field(2, b"") + field(3, field(3, b""))
TEXT_AS_FLOAT = field(2, tensor_type(11, ())) + field(3, field(1, field(4, field(1, "x"))))
ODD = ("x", [], [7, 7, 7], 1.5, float("nan"), np.ones(3, np.float32), EMPTY, LIST, None)
PARAMETERS = {
    "conv": ("weight", "bias", "strides", "pad_type", "pad", "groups", "dilations", "x"),
    "linear": ("weight", "bias", "x"),
    "batch_norm": ("gamma", "beta", "mean", "variance", "epsilon", "x"),
    "gelu": ("mode", "x"),
    "softmax": ("axis", "x"),
    "mul": ("x", "y"),
    "real_div": ("x", "y"),
}


@pytest.mark.parametrize("kind", PARAMETERS)
def test_odd_parameters_are_read_or_refused(kind: str, tmp_path: Path) -> None:
    tensors = tiny_fastvithd()
    refused = 0
    for parameter in PARAMETERS[kind]:
        for odd in (*ODD, TEXT_AS_FLOAT):
            made = OddTower(tensors, kind, parameter, odd)
            made.x = made.input("images", (1, 3, 256, 256))
            fastvit(made, TINY_LAYERS, "layer", se=False)
            refused += is_refused(made.write(tmp_path / PACKAGE))
    assert refused
