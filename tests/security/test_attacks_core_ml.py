"""Hostile Core ML packages: each is refused in one line that names the fault."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attacks
import isolated
import numpy as np
import pytest
from attacks import Build, Cases, put
from core_ml_file import MODEL, WEIGHTS, Program, entry, tensor_type, varint
from core_ml_file import put as field
from core_ml_towers import write_app_export

PACKAGE = "fastvithd.mlpackage"
UNSOUND = "not a valid Core ML model"
WEIGHT = np.ones((8, 3, 3, 3), np.float32)  # of the tiny tower's first layer


# Files


def without(part: str) -> Build:
    return lambda case: (case / PACKAGE / part).unlink()


def linked(part: str, target: str) -> Build:
    def build(case: Path) -> None:
        path = case / PACKAGE / part
        path.unlink()
        path.symlink_to(target.replace("CASE", str(case)))

    return build


def pipe(case: Path) -> None:
    (case / PACKAGE / WEIGHTS).unlink()
    os.mkfifo(case / PACKAGE / WEIGHTS)


def a_file(case: Path) -> None:
    shutil.rmtree(case / PACKAGE)
    (case / PACKAGE).write_bytes(b"no directory")


def manifest(text: str) -> Build:
    return lambda case: put(case / PACKAGE / "Manifest.json", text)


def large_model(case: Path) -> None:
    put(case / PACKAGE / MODEL, b"")
    os.truncate(case / PACKAGE / MODEL, 1 << 34)


ELSEWHERE = {"itemInfoEntries": {"A": {"path": "../../config.json"}}, "rootModelIdentifier": "A"}
FILES: Cases = {
    "no manifest": (without("Manifest.json"), "Manifest.json is missing"),
    "no model": (without(MODEL), "model.mlmodel is missing"),
    "no weights": (without(WEIGHTS), "weight.bin is missing"),
    "package is a file": (a_file, "is not a directory"),
    "weights elsewhere": (linked(WEIGHTS, "CASE/model.safetensors"), "a link to outside"),
    "weights of the system": (linked(WEIGHTS, "/dev/zero"), "a link to outside"),
    "model elsewhere": (linked(MODEL, "/etc/passwd"), "a link to outside"),
    "a link to itself": (linked(WEIGHTS, "weight.bin"), "weight.bin is missing"),
    "a dangling link": (linked(WEIGHTS, "nothing"), "weight.bin is missing"),
    "a pipe": (pipe, "is not a readable file"),
    "manifest no JSON": (manifest("{"), "not valid JSON"),
    "manifest of a list": (manifest('{"itemInfoEntries": []}'), "does not name"),
    "manifest names another file": (manifest(json.dumps(ELSEWHERE)), "does not name"),
    "model of 16 GB": (large_model, "larger than 16 MB"),
}


# The model's messages


def model(data: bytes) -> Build:
    return lambda case: put(case / PACKAGE / MODEL, data)


def ml_program(block: bytes, name: str = "main", opset: str = "CoreML6") -> bytes:
    function = field(2, "CoreML6") + entry(3, opset, block)
    return field(502, entry(2, name, function))


def operation(kind: str = "gelu", name: str = "y", **inputs: str) -> bytes:
    given = b"".join(entry(2, key, field(1, field(1, value))) for key, value in inputs.items())
    return field(3, field(1, kind) + given + field(3, field(1, name)))


NESTED = b""
for _ in range(1000):  # a loop in a loop in a loop
    NESTED = field(4, field(3, field(1, "while_loop") + field(3, field(1, "x")) + NESTED))
LONG = b"\xff" * 9
MESSAGES: Cases = {
    "empty": (model(b""), "holds no ML program"),
    "another kind of model": (model(field(1, 4) + field(500, b"")), "holds no ML program"),
    "number without end": (model(b"\xff" * 100), "a number without end"),
    "number cut off": (model(b"\x88"), "a number without end"),
    "number beyond 64 bits": (model(LONG + b"\x7f"), "beyond 64 bits"),
    "length beyond the file": (model(varint(502 << 3 | 2) + varint(1 << 40)), "bytes, 0 are left"),
    "length of 2^64 - 1": (model(varint(502 << 3 | 2) + LONG + b"\x01"), "are left"),
    "group": (model(b"\x0b" * 10), "wire type 3"),
    "program is a number": (model(field(502, 7)), "field 502 is a number"),
    "a million fields": (model(b"\x08\x01" * 1_000_001), "more than 1000000 fields"),
    "a million operations": (model(ml_program(b"\x1a\0" * 1_000_001)), "more than 1000000"),
    "20001 operations": (model(ml_program(b"\x1a\0" * 20_001)), "has 20001 operations"),
    "no main": (model(ml_program(b"", "other")), "has the functions other instead"),
    "no body": (model(ml_program(b"", opset="CoreML5")), "the function has no body"),
    "no result": (model(ml_program(field(3, field(1, "gelu")))), "without result"),
    "name no UTF-8": (model(ml_program(field(3, field(1, b"\xff") + b"\x1a\0"))), "not UTF-8"),
    "escapes in a name": (
        model(ml_program(operation("\x1b]0;owned\x07", x="\x1b[31m"))),
        "'\\x1b[31m' is used before",
    ),
    "undefined": (model(ml_program(operation(x="x"))), "'x' is used before it is defined"),
    "circle": (
        model(ml_program(operation(x="z") + operation(name="z", x="y"))),
        "'z' is used before",
    ),
    "takes itself": (model(ml_program(operation(x="y"))), "'y' is used before"),
    "given twice": (model(ml_program(operation() + operation())), "'y' is defined twice"),
    "output undefined": (model(ml_program(field(2, "nothing"))), "'nothing' is used before"),
    "1000 loops deep": (
        model(ml_program(field(3, field(1, "while_loop") + field(3, field(1, "x")) + NESTED))),
        "contains nested operations",
    ),
}


# Constants


def program(make: Callable[[Program], Any]) -> Build:
    """Write a program of one convolution, whose weight `make` adds."""

    def build(case: Path) -> None:
        made = Program()
        pixels = made.input("images", (1, 3, 256, 256))
        weight = make(made)
        options = {"strides": [2, 2], "pad_type": "custom", "pad": [1] * 4, "groups": 1}
        made.op("conv", x=pixels, weight=weight, dilations=[1, 1], **options)
        put(case / PACKAGE / MODEL, made.model())
        put(case / PACKAGE / WEIGHTS, made.weights())

    return build


def value(
    shape: tuple[int, ...] = WEIGHT.shape,
    *,
    offset: int = 64,
    code: int = 11,
    kind: int = 2,
    size: int = WEIGHT.nbytes,
    file: str = "@model_path/weights/weight.bin",
) -> Build:
    """Write a weight with the given reference to a valid blob."""

    def make(made: Program) -> str:
        start = made.blob(bytes(size), kind)
        assert start == 64
        where = field(1, file) + field(2, offset)
        return made.const(field(2, tensor_type(code, shape)) + field(5, where))

    return program(make)


def weights(change: Callable[[bytearray], Any]) -> Build:
    def build(case: Path) -> None:
        program(lambda made: made.const(WEIGHT))(case)
        data = bytearray((case / PACKAGE / WEIGHTS).read_bytes())
        changed = change(data)
        put(case / PACKAGE / WEIGHTS, bytes(data if changed is None else changed))

    return build


def record(**changes: int) -> Build:
    """Change the record of the first blob."""

    def change(data: bytearray) -> None:
        names = ("mark", "kind", "size", "start", "padding")
        found = dict(zip(names, struct.unpack_from("<IIQQQ", data, 64), strict=True)) | changes
        struct.pack_into("<IIQQQ", data, 64, *found.values())

    return weights(change)


def not_finite(case: Path) -> None:
    """Make the first weight of the tower NaN."""
    data = bytearray((case / PACKAGE / WEIGHTS).read_bytes())
    struct.pack_into("<f", data, 128, float("nan"))
    put(case / PACKAGE / WEIGHTS, bytes(data))


def overlapping(made: Program) -> str:
    """Put the record of the second blob into the data of the first."""
    inner = struct.pack("<IIQQQ", 0xDEADBEEF, 2, WEIGHT.nbytes, 192, 0).ljust(64, b"\0")
    made.blob(inner + bytes(2000), 2)
    first = field(1, "weights/weight.bin") + field(2, 64)
    made.const(field(2, tensor_type(11, (516,))) + field(5, first))
    second = field(1, "weights/weight.bin") + field(2, 128)
    return made.const(field(2, tensor_type(11, WEIGHT.shape)) + field(5, second))


def compressed(kind: str, shape: tuple[int, ...] = WEIGHT.shape, **values: Any) -> Build:
    def make(made: Program) -> str:
        given = {k: made.stored(v) if isinstance(v, np.ndarray) else v for k, v in values.items()}
        return made.raw(kind, {}, given, shape)

    return program(make)


def deep(made: Program) -> str:
    weight = made.const(WEIGHT)
    for _ in range(5):
        weight = made.raw("constexpr_cast", {"source_val": weight}, {}, WEIGHT.shape)
    return weight


BYTES = np.zeros(216, np.uint8)
TABLE = np.zeros(256, np.float32)
LUT = "constexpr_lut_to_dense"
CONSTANTS: Cases = {
    "offset outside": (value(offset=1 << 20), "a blob at 1048576 of"),
    "offset of 2^64 - 64": (value(offset=(1 << 64) - 64), "a blob at 18446744073709551552"),
    "offset of the header": (value(offset=0), "a blob at 0 of"),
    "offset between": (value(offset=65), "a blob at 65 of"),
    "offset of data": (value(offset=128), "no blob at 128"),
    "other file": (value(file="@model_path/../../config.json"), "only weights/weight.bin is read"),
    "product wraps": (value((65536,) * 4), "bytes of data for the shape"),
    "2^63": (value((1 << 63,)), "bytes of data for the shape"),
    "2^64 - 1": (value(((1 << 64) - 1,)), "bytes of data for the shape"),
    "zero": (value((0, 3, 3, 3)), "bytes of data for the shape"),
    "13 dimensions": (value((1,) * 13), "13 dimensions"),
    "100000 dimensions": (value((1,) * 100_000), "100000 dimensions"),
    "unknown type": (value(code=99), "bytes of data for the shape"),
    "unknown type of data": (value(kind=99), "of the unknown type 99"),
    "type unlike the data's": (value(kind=1), "with another data type than its data"),
    "too short": (value(size=64), "has 64 bytes of data"),
    "too long": (value(size=WEIGHT.nbytes + 64), "bytes of data for the shape"),
    "record: no mark": (record(mark=1), "no blob at 64"),
    "record: size": (record(size=1 << 40), "bytes at 128 of"),
    "record: size wraps": (record(size=(1 << 64) - 1), "bytes at 128 of"),
    "record: start": (record(start=1 << 30), "bytes at 1073741824"),
    "record: start before": (record(start=0), "bytes at 0 of"),
    "overlap": (program(overlapping), "overlaps another"),
    "truncated": (weights(lambda data: data[:500]), "says 864 bytes"),
    "weight.bin empty": (weights(lambda data: b""), "only 0 bytes"),
    "weight.bin of version 1": (
        weights(lambda data: data.__setitem__(4, 1)),
        "version 1 instead of 2",
    ),
    "NaN": (not_finite, "vision_tower.stem.conv.weight; download the checkpoint again"),
    "no chain": (program(lambda made: made.const(WEIGHT)), "ends after 1 layers"),
    "values inline": (
        program(
            lambda made: made.const(
                field(2, tensor_type(11, WEIGHT.shape))
                + field(3, field(1, field(1, field(1, bytes(8)))))
            )
        ),
        "has 2 values for the shape",
    ),
    "form not known": (compressed("constexpr_magic", x=BYTES), "constexpr_magic, which is not"),
    "sparse palettes": (compressed("constexpr_lut_to_sparse", x=BYTES), "is not supported"),
    "constants too deep": (program(deep), "nests constants 5 levels deep"),
    "flood": (compressed(LUT, (1 << 10,) * 3, indices=BYTES, lut=TABLE), "too little data"),
    "much data": (
        compressed(LUT, (1, 1, 1, 2), indices=BYTES, lut=TABLE[:2]),
        "'indices' larger than itself",
    ),
    "few indices": (compressed(LUT, indices=BYTES[:99], lut=TABLE), "99 bytes of indices"),
    "table of 3": (compressed(LUT, indices=BYTES, lut=TABLE[:3]), "does not fit constexpr_lut"),
    "no table": (compressed(LUT, indices=BYTES), "does not fit constexpr_lut"),
    "axis outside": (
        compressed(
            "constexpr_affine_dequantize",
            quantized_data=BYTES.astype(np.int8).reshape(WEIGHT.shape),
            zero_point=np.zeros(8, np.int8), scale=TABLE[:8], axis=9,
        ),
        "does not fit constexpr_affine",
    ),
    "blocks that do not divide": (
        compressed(
            "constexpr_blockwise_shift_scale",
            data=BYTES.astype(np.int8).reshape(WEIGHT.shape),
            scale=TABLE[:7].reshape(7, 1, 1, 1),
        ),
        "blocks of shape (7, 1, 1, 1)",
    ),
    "index beyond the table": (
        compressed(
            LUT,
            indices=BYTES.reshape(WEIGHT.shape) + np.uint8(4),
            lut=TABLE[:4].reshape(1, 1, 1, 1, 4, 1),
        ),
        "an index beyond the table",
    ),
    "mask unlike its values": (
        compressed("constexpr_sparse_to_dense", nonzero_data=TABLE[:8], mask=BYTES[:27]),
        "8 values for 0 places",
    ),
}  # fmt: skip


GROUPS = {"files": FILES, "messages": MESSAGES, "constants": CONSTANTS}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, isolated.Outcome]:
    """Outcomes of all cases of GROUPS."""
    sound = write_app_export(tmp_path_factory.mktemp("packages") / "sound")
    return attacks.outcomes(sound, attacks.builds(GROUPS))


@pytest.mark.parametrize(("group", "name"), attacks.refused(GROUPS))
def test_hostile_package_is_refused(
    outcomes: dict[str, isolated.Outcome], group: str, name: str
) -> None:
    isolated.assert_refused(outcomes[f"{group} {name}"], GROUPS[group][name][1])


def test_sound_package_is_read(tmp_path: Path) -> None:
    done = attacks.outcomes(write_app_export(tmp_path / "sound"), {"sound": lambda case: None})[
        "sound"
    ]
    isolated.assert_done(done)
