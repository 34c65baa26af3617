"""Round trips of every form in which Core ML packages store weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core_ml_file import Program, packed_bits

from mlx_mobileclip.checkpoints.core_ml.program import read_program

SHAPE = (6, 4, 3, 3)
RNG = np.random.default_rng(0)


def read(tmp_path: Path, program: Program, name: str) -> np.ndarray:
    program.input("x", (1,))
    path = program.write(tmp_path / "case.mlpackage")
    return np.asarray(read_program(path, "case").constants[name].read())


def read_operation(
    tmp_path: Path, kind: str, dtype: str, attributes: dict[str, Any], **inputs: Any
) -> np.ndarray:
    """Read the result of a constant operation; (array, code) has a type that NumPy lacks."""
    program = Program(dtype)

    def stored(value: Any) -> Any:
        if isinstance(value, tuple):
            return program.stored(*value)
        return program.stored(value) if isinstance(value, np.ndarray) and value.ndim else value

    given = {key: program.const(stored(value)) for key, value in inputs.items()}
    attributes = {key: stored(value) for key, value in attributes.items()}
    name = program.raw(kind, given, attributes, SHAPE)
    return read(tmp_path, program, name)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_plain_weights(dtype: str, tmp_path: Path) -> None:
    value = RNG.standard_normal(SHAPE).astype(dtype)
    program = Program(dtype)
    name = program.const(value)
    found = read(tmp_path, program, name)
    assert found.dtype == value.dtype and np.array_equal(found, value)


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8])
def test_palette_of_ios_16(bits: int, tmp_path: Path) -> None:
    table = RNG.standard_normal(1 << bits).astype(np.float16)
    indices = RNG.integers(0, 1 << bits, SHAPE)
    packed = np.frombuffer(packed_bits(indices, bits), np.uint8)
    given = {"indices": packed, "lut": table, "shape": np.array(SHAPE, np.uint32)}
    found = read_operation(tmp_path, "constexpr_lut_to_dense", "float16", given)
    assert found.dtype == np.float16 and np.array_equal(found, table[indices])


@pytest.mark.parametrize(("bits", "code"), [(1, 37), (2, 36), (3, 39), (4, 35), (6, 38), (8, 31)])
@pytest.mark.parametrize("groups", [(1, 1), (3, 1), (1, 2)], ids=str)
def test_palettes_of_ios_18(bits: int, code: int, groups: tuple[int, int], tmp_path: Path) -> None:
    """One table for all weights, per two outputs, or per two inputs."""
    table = RNG.standard_normal((*groups, 1, 1, 1 << bits, 1)).astype(np.float32)
    indices = RNG.integers(0, 1 << bits, SHAPE).astype(np.uint8)
    found = read_operation(
        tmp_path, "constexpr_lut_to_dense", "float32", {}, indices=(indices, code), lut=table
    )
    expected = np.empty(SHAPE, np.float32)
    for index in np.ndindex(SHAPE):
        row = index[0] * groups[0] // SHAPE[0], index[1] * groups[1] // SHAPE[1]
        expected[index] = table[(*row, 0, 0, indices[index], 0)]
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("kind", [np.int8, np.uint8])
@pytest.mark.parametrize("each", [True, False], ids=["each output", "all"])
def test_int8_of_ios_16(kind: Any, each: bool, tmp_path: Path) -> None:
    low, high = np.iinfo(kind).min, np.iinfo(kind).max
    values = RNG.integers(low, high + 1, SHAPE).astype(kind)
    zero = RNG.integers(low, high + 1, 6).astype(kind)
    scale = RNG.random(6).astype(np.float32)
    given: dict[str, Any] = {"quantized_data": values, "zero_point": zero, "scale": scale}
    if not each:
        zero, scale = zero[:1], scale[:1]
        given |= {"zero_point": int(zero[0]), "scale": float(scale[0])}
    found = read_operation(tmp_path, "constexpr_affine_dequantize", "float32", given | {"axis": 0})
    wide = zero.astype(np.float32)[:, None, None, None], scale[:, None, None, None]
    assert np.array_equal(found, (values.astype(np.float32) - wide[0]) * wide[1])


@pytest.mark.parametrize(("code", "low", "high"), [(25, -8, 7), (35, 0, 15), (21, -128, 127)])
@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_blocks_of_ios_18(
    code: int, low: int, high: int, offset: bool, dtype: str, tmp_path: Path
) -> None:
    kind = np.uint8 if code == 35 else np.int8
    values = RNG.integers(low, high + 1, SHAPE).astype(kind)
    scale = RNG.random((6, 2, 1, 1)).astype(dtype)
    zeros = RNG.integers(low, high + 1, (6, 2, 1, 1)).astype(kind)
    given = {"data": (values, code), "scale": scale} | ({"offset": (zeros, code)} if offset else {})
    found = read_operation(tmp_path, "constexpr_blockwise_shift_scale", dtype, {}, **given)
    shifted = values.astype(np.float32) - (np.repeat(zeros, 2, 1) if offset else 0)
    expected = (shifted * np.repeat(scale, 2, 1).astype(np.float32)).astype(dtype)
    assert found.dtype == expected.dtype and np.array_equal(found, expected)


@pytest.mark.parametrize("form", ["iOS 16", "iOS 18"])
def test_sparse_weights(form: str, tmp_path: Path) -> None:
    mask = RNG.random(SHAPE) < 0.3
    values = RNG.standard_normal(int(mask.sum())).astype(np.float32)
    expected = np.zeros(SHAPE, np.float32)
    expected[mask] = values
    kind = "constexpr_sparse_to_dense"
    if form == "iOS 16":
        bits = np.frombuffer(packed_bits(mask, 1), np.uint8)
        given = {"nonzero_data": values, "mask": bits, "shape": np.array(SHAPE, np.uint32)}
        found = read_operation(tmp_path, kind, "float32", given)
    else:
        found = read_operation(tmp_path, kind, "float32", {}, nonzero_data=values, mask=(mask, 37))
    assert np.array_equal(found, expected)


def test_nested_constants(tmp_path: Path) -> None:
    """A palette whose table is quantised."""
    program = Program("float32")
    table = RNG.integers(-128, 128, (1, 1, 1, 1, 4, 1)).astype(np.int8)
    scale = np.full((1,) * 6, 0.5, np.float32)
    given = {"data": program.const(program.stored(table))}
    given["scale"] = program.const(program.stored(scale))
    lut = program.raw("constexpr_blockwise_shift_scale", given, {}, table.shape)
    indices = RNG.integers(0, 4, SHAPE).astype(np.uint8)
    given = {"indices": program.const(program.stored(indices, 36)), "lut": lut}
    name = program.raw("constexpr_lut_to_dense", given, {}, SHAPE)
    found = read(tmp_path, program, name)
    assert np.array_equal(found, table.reshape(-1)[indices] * np.float32(0.5))


def test_float16_cast(tmp_path: Path) -> None:
    value = RNG.standard_normal(SHAPE).astype(np.float16)
    found = read_operation(tmp_path, "constexpr_cast", "float32", {"source_val": value})
    assert found.dtype == np.float32 and np.array_equal(found, value.astype(np.float32))
