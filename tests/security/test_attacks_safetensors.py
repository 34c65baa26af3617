"""Hostile safetensors files: each is refused in one line that names the fault."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import attacks
import isolated
import mlx.core as mx
import numpy as np
import pytest
import synthetic
from attacks import (
    VICTIM,
    Build,
    Cases,
    header_of,
    put,
    rewrite_safetensors,
    safetensors,
    tensors,
    with_duplicate,
)

# Malformed files


def entry(**changes: Any) -> Build:
    """Change the header's entry of one tensor."""

    def build(case: Path) -> None:
        path = case / "model.safetensors"
        header, data = header_of(path)
        header[VICTIM] |= changes
        put(path, safetensors(header, data))

    return build


def raw(data: bytes) -> Build:
    return lambda case: put(case / "model.safetensors", data)


def overlapping(header: dict[str, Any], data: bytes) -> bytes:
    other = next(k for k, v in header.items() if v.get("shape") == [64] and k != VICTIM)
    header[VICTIM] = header[other]
    return safetensors(header, data)


def with_hole(header: dict[str, Any], data: bytes) -> bytes:
    last = max((k for k in header if k[0] != "_"), key=lambda k: header[k]["data_offsets"][1])
    header[last]["data_offsets"] = [n + 64 for n in header[last]["data_offsets"]]
    return safetensors(header, data + bytes(64))


def many_tensors(header: dict[str, Any], data: bytes) -> bytes:
    one = {"dtype": "U8", "shape": [1]}
    tiny = {f"{i}": one | {"data_offsets": [i, i + 1]} for i in range(20000)}
    return safetensors(tiny, bytes(20000))


UNSOUND = "not a valid safetensors file"
MALFORMED: Cases = {
    "64-bit product wraps": (entry(shape=[65536] * 4), UNSOUND),
    "product wraps, no data": (entry(shape=[65536] * 4, data_offsets=[0, 0]), UNSOUND),
    "negative shape": (entry(shape=[-8, -8]), UNSOUND),
    "32-bit wrap": (entry(shape=[(1 << 32) + 64]), UNSOUND),
    "fractional shape": (entry(shape=[64.5]), UNSOUND),
    "shape of texts": (entry(shape=["64"]), UNSOUND),
    "shape null": (entry(shape=None), UNSOUND),
    "shape smaller than data": (entry(shape=[32]), UNSOUND),
    "shape larger than data": (entry(shape=[128]), UNSOUND),
    "zero dimension": (entry(shape=[0, (1 << 31) - 1, (1 << 31) - 1]), UNSOUND),
    "100000 dimensions": (entry(shape=[64] + [1] * 100000), "has the shape"),
    "5 dimensions": (entry(shape=[64, 1, 1, 1, 1]), "has the shape"),
    "overlap": (rewrite_safetensors(overlapping), UNSOUND),
    "hole": (rewrite_safetensors(with_hole), UNSOUND),
    "trailing bytes": (rewrite_safetensors(lambda h, d: safetensors(h, d + bytes(64))), UNSOUND),
    "truncated data": (rewrite_safetensors(lambda h, d: safetensors(h, d[:-1])), UNSOUND),
    "duplicate with other shape": (
        rewrite_safetensors(lambda h, d: with_duplicate(h, d, shape=[8, 8])),
        "has shape (8, 8) instead of (64,)",
    ),
    "duplicate with other data": (
        rewrite_safetensors(lambda h, d: with_duplicate(h, d, data_offsets=[0, 256])),
        UNSOUND,
    ),
    "offsets reversed": (entry(data_offsets=[256, 0]), UNSOUND),
    "offsets negative": (entry(data_offsets=[-256, 0]), UNSOUND),
    "offsets past the end": (entry(data_offsets=[1 << 40, (1 << 40) + 256]), UNSOUND),
    "offsets beyond 64 bits": (entry(data_offsets=[0, 1 << 64]), UNSOUND),
    "offsets missing": (entry(data_offsets=None), UNSOUND),
    "unknown dtype": (entry(dtype="I4"), UNSOUND),
    "dtype a number": (entry(dtype=7), UNSOUND),
    "header 2^63 bytes": (raw((1 << 63).to_bytes(8, "little") + b"{}"), "a header of"),
    "header 5 MB": (raw((5 << 20).to_bytes(8, "little") + b"{}"), "a header of"),
    "header longer than file": (raw((1000).to_bytes(8, "little") + b"{}"), UNSOUND),
    "header no JSON": (raw(safetensors(b"{x", b"")), UNSOUND),
    "header no UTF-8": (raw(safetensors(b'{"\xff": 1}', b"")), UNSOUND),
    "header a list": (raw(safetensors(b"[1, 2]", b"")), UNSOUND),
    "header nested": (raw(safetensors(b'{"a":' + b"[" * 1000000, b"")), UNSOUND),
    "header without tensors": (raw(safetensors(b"{}", b"")), "match no known FastVLM layout"),
    "metadata no texts": (
        rewrite_safetensors(lambda h, d: safetensors(h | {"__metadata__": {"a": [1]}}, d)),
        UNSOUND,
    ),
    "20000 tensors": (rewrite_safetensors(many_tensors), "match no known FastVLM layout"),
    "empty": (raw(b""), UNSOUND),
    "7 bytes": (raw(b"1234567"), "a header of"),
    "GGUF": (raw(b"GGUF\x03\0\0\0" + b"\xff" * 64), "a header of"),
    "zip": (raw(b"PK\x03\x04" + bytes(200)), "a header of"),
    "pickle": (raw(b"\x80\x02cos\nsystem\n(S'touch pwned'\ntR." + bytes(99)), "a header of"),
}


# Tensors in sound files


def victim(value: mx.array) -> Build:
    return tensors(lambda t: t.update({VICTIM: value}))


def with_value(bad: float) -> mx.array:
    return mx.where(mx.arange(64) == 7, bad, 1.0)


def overflowing(loaded: dict[str, Any]) -> None:
    """Finite weights, infinite logits."""
    loaded[VICTIM] = mx.full((64,), 1e36)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        loaded[name] = loaded[name] * 1e4


MISFITS: Cases = {
    "missing": (tensors(lambda t: t.pop(VICTIM)), f"1 missing: {VICTIM}"),
    "extra": (tensors(lambda t: t.update(x=mx.ones(3))), "1 with no place in the model: x"),
    "misshapen": (victim(mx.ones((65,))), "has shape (65,) instead of (64,)"),
    "transposed": (victim(mx.ones((1, 64))), "has shape (1, 64) instead of (64,)"),
    "int8": (victim(mx.ones((64,), mx.int8)), "is I8, not one of"),
    "complex": (victim(mx.ones((64,), mx.complex64)), "is C64, not one of"),
    "bool": (victim(mx.ones((64,), mx.bool_)), "is BOOL, not one of"),
    "uint32 for float": (victim(mx.ones((64,), mx.uint32)), f"{VICTIM} is mlx.core.uint32"),
    "int64 for float": (victim(mx.ones((64,), mx.int64)), f"{VICTIM} is mlx.core.int64"),
    "NaN": (victim(with_value(float("nan"))), "not finite in float32"),
    "infinite": (victim(with_value(float("-inf"))), "not finite in float32"),
    "overflowing": (tensors(overflowing), "the decoder's logits are not finite"),
    "escapes in a name": (
        tensors(lambda t: t.update({"\x1b]0;owned\x07\n\nok: done": mx.ones(3)})),
        "\ufffd]0;owned\ufffd\ufffd\ufffdok: done",
    ),
    "a name of 1 MB": (tensors(lambda t: t.update({"n" * 1000000: mx.ones(3)})), "no place"),
}


def with_index(file: str, index: Build | None = None) -> Build:
    """Put an index that names one other file beside model.safetensors."""

    def build(case: Path) -> None:
        path = case / "model.safetensors.index.json"
        if index is not None:
            index(path)
            return
        (case / file).write_bytes((case / "model.safetensors").read_bytes())
        put(path, json.dumps({"weight_map": {VICTIM: file}}))

    return build


INDEXES: Cases = {
    "old index": (with_index("model-00001-of-00001.safetensors"), "remove whichever is out of"),
    "a pipe": (with_index("", os.mkfifo), "is not a regular file"),
    "a link to nothing": (with_index("", lambda path: path.symlink_to("nowhere")), "No such file"),
    "outside": (with_index("", lambda path: path.symlink_to("/etc/passwd")), "link to outside"),
}
GROUPS = {"file": MALFORMED, "tensors": MISFITS, "index": INDEXES}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, isolated.Outcome]:
    """Outcomes of all cases of GROUPS."""
    sound = attacks.write_sound(tmp_path_factory.mktemp("checkpoints"))
    return attacks.outcomes(sound, attacks.builds(GROUPS))


@pytest.mark.parametrize(("group", "name"), attacks.refused(GROUPS))
def test_hostile_safetensors_are_refused(
    outcomes: dict[str, isolated.Outcome], group: str, name: str
) -> None:
    isolated.assert_refused(outcomes[f"{group} {name}"], GROUPS[group][name][1])


def test_flipped_bytes_never_crash(tmp_path: Path) -> None:
    """A damaged file is refused, or differs in values only."""
    sound = synthetic.write_layout(tmp_path / "sound", "llava_qwen2")
    data = (sound / "model.safetensors").read_bytes()
    header_bytes = 8 + int.from_bytes(data[:8], "little")
    rng = np.random.default_rng(5)
    cases = []
    for i in range(40):
        case = tmp_path / f"case{i}"
        shutil.copytree(sound, case, copy_function=os.link)
        damaged = bytearray(data)
        # Most of the file is values; most of the attack surface is the header.
        for position in rng.integers(0, header_bytes if i % 4 else len(data), 1 + i % 3):
            damaged[position] ^= 1 << int(rng.integers(8))
        put(case / "model.safetensors", bytes(damaged))
        cases.append(("answer", ["--model", str(case), "--prompt", "x", "--max-tokens", "1"]))
    statuses = []
    for outcome in isolated.run(cases):
        statuses.append(outcome.status)
        if outcome.status:
            isolated.assert_refused(outcome, "")
    assert set(statuses) <= {0, 1}
    assert statuses.count(1) > 15
