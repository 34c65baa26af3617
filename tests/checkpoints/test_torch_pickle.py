"""PyTorch files as hostile input: refused with a reason and within bounds; no code is run."""

import os
import pickle
import struct
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from python_memory import python_memory_below
from torch_file import (
    contiguous,
    dictionary,
    integer,
    name,
    numbers,
    pickle_of,
    storage,
    tensor,
    text,
    tuple_of,
    write_torch,
    write_zip,
)

from mlx_mobileclip import CheckpointError
from mlx_mobileclip.checkpoints.torch_pickle import read_torch

FLOATS = struct.pack("<4f", 1, 2, 3, 4)


def make_tensor(**changes: Any) -> bytes:
    given = {"key": "0", "kind": "FloatStorage", "items": 4, "offset": 0, "shape": (2, 2)}
    given |= changes
    stored = storage(given["key"], given["kind"], given["items"])
    strides = given.get("strides", contiguous(given["shape"]))
    return tensor(stored, given["offset"], given["shape"], strides)


def write_file(path: Path, found: bytes, **storages: bytes) -> Path:
    return write_zip(path / "m.pt", pickle_of(found), storages or {"0": FLOATS})


def refusal(path: Path, seconds: float = 5) -> str:
    """Return the error for a file, which must be one line and come quickly."""
    started = time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        read_torch(path)
    assert time.perf_counter() - started < seconds
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_dtype_and_stride_is_read(tmp_path: Path) -> None:
    found = dictionary(
        {
            "plain": make_tensor(),
            "turned": make_tensor(strides=(1, 2)),
            "part": make_tensor(offset=1, shape=(3,)),
            "scalar": make_tensor(offset=2, shape=()),
            "spread": make_tensor(offset=2, shape=(4,), strides=(0,)),
            "empty": make_tensor(shape=(2, 0)),
        }
    )
    tensors = read_torch(write_file(tmp_path, found))
    assert tensors["plain"].tolist() == [[1, 2], [3, 4]]
    assert tensors["turned"].tolist() == [[1, 3], [2, 4]]
    assert tensors["part"].tolist() == [2, 3, 4]
    assert tensors["scalar"].item() == 3
    assert tensors["spread"].tolist() == [3, 3, 3, 3]
    assert tensors["empty"].shape == (2, 0)
    values = {"w": np.linspace(-3, 3, 12, dtype=np.float32).reshape(3, 4)}
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        found = read_torch(write_torch(tmp_path / "t.pt", values, dtype))["w"]
        assert found.dtype == dtype
        assert mx.array_equal(found, mx.array(values["w"]).astype(dtype)).item()


def test_wrapped_parameters_are_read(tmp_path: Path) -> None:
    hooks = name("collections", "OrderedDict") + b")R"
    parameter = name("torch._utils", "_rebuild_parameter")
    parameter += tuple_of(make_tensor(), b"\x88", hooks) + b"R"
    outer = {
        "epoch": integer(4),
        "state_dict": dictionary({"w": parameter}),
        "optimizer": dictionary({"exp_avg": make_tensor(), "betas": tuple_of(integer(1), b"N")}),
    }
    tensors = read_torch(write_file(tmp_path, dictionary(outer, ordered=False)))
    assert list(tensors) == ["w"] and tensors["w"].shape == (2, 2)


class Gadget:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_no_code_is_run(tmp_path: Path, protocol: int) -> None:
    sentinel = tmp_path / "ran"
    gadgets = {
        f"{os.system.__module__}.system": Gadget(os.system, f"touch {sentinel}"),
        "eval": Gadget(eval, f"open({str(sentinel)!r}, 'w')"),
        "builtins.getattr": Gadget(getattr, os, "system"),
        "pathlib": sentinel,
    }
    for word, gadget in gadgets.items():
        if word == "builtins.getattr":  # modules cannot be pickled; only the name
            data = pickle_of(name("builtins", "getattr"))
        else:
            data = pickle.dumps({"w": gadget}, protocol=protocol)
        assert word in refusal(write_zip(tmp_path / "m.pt", data, {}))
    assert not sentinel.exists()


@pytest.mark.parametrize(
    "requested",
    [
        ("torch", "load"),
        ("torch._utils", "_rebuild_device_tensor_from_numpy"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("torch.storage", "_load_from_bytes"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("collections", "defaultdict"),
        ("argparse", "Namespace"),
    ],
)
def test_unknown_globals_are_refused(requested: tuple[str, str], tmp_path: Path) -> None:
    by_name = pickle_of(name(*requested))
    by_stack = pickle_of(text(requested[0]) + text(requested[1]) + b"\x93")
    for data in (by_name, by_stack):
        assert ".".join(requested) in refusal(write_zip(tmp_path / "m.pt", data, {}))


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"(ios\nsystem\n", "INST"),
        (b"(cos\nsystem\no", "OBJ"),
        (b"}}\x81", "NEWOBJ"),
        (b"\x82\x01", "EXT1"),
        (b"\x8b\x04\x00\x00\x00aaaa", "LONG4"),
        (b"\x97", "NEXT_BUFFER"),
        (b"I12345\n", "INT"),
        (b"Pname\n", "PERSID"),
        (b"}2", "DUP"),
    ],
)
def test_unknown_opcodes_are_refused(data: bytes, word: str, tmp_path: Path) -> None:
    refused = refusal(write_zip(tmp_path / "m.pt", pickle_of(data), {}))
    assert f"instruction {word};" in refused or "asks for os.system" in refused


@pytest.mark.parametrize(
    "found",
    [
        make_tensor(shape=(3, 2)),
        make_tensor(offset=1),
        make_tensor(offset=-1, shape=(1,)),
        make_tensor(shape=(1 << 40,), strides=(0,)),
        make_tensor(shape=(2, 2), strides=(1 << 62, 1)),
        make_tensor(shape=(1 << 300,)),
        make_tensor(shape=(-2, -2), strides=(-2, -1)),
        make_tensor(shape=(2, 2), strides=(1,)),
        make_tensor(shape=(1,) * 40, strides=(1,) * 40),
        make_tensor(items=1 << 50, shape=(2,)),
        make_tensor(items=-4, shape=(1,)),
        make_tensor(items=5),
        make_tensor(key="1"),
        make_tensor(key="../0"),
        make_tensor(kind="LongStorage"),
        make_tensor(kind="UntypedStorage"),
        text("no tensor"),
        name("torch", "FloatStorage"),
        name("torch._utils", "_rebuild_tensor_v2") + b")R",
        name("collections", "OrderedDict") + tuple_of(integer(1)) + b"R",
        integer(1) + b"Q",
        b"]" + b"}b",
        b"h\x07",
        b"u",
        b"",
        b"R",
        b"s",
        b"\x86",
        numbers((1, 2)),
    ],
)
def test_impossible_tensors_are_refused(found: bytes, tmp_path: Path) -> None:
    refusal(write_file(tmp_path, dictionary({"w": found})))
    refusal(write_file(tmp_path, found))


def test_keys_are_never_hashed_deeply(tmp_path: Path) -> None:
    nested = b")" + b"q\x00h\x00\x86" * 60  # a pair of equal pairs, 60 times: 2**60 hashes
    refused = refusal(write_file(tmp_path, b"}" + nested + integer(1) + b"s"))
    assert "holds no tensors, only tuple" in refused


def test_many_views_of_one_storage_are_refused(tmp_path: Path) -> None:
    big = np.zeros(1 << 18, np.float32).tobytes()
    entry = make_tensor(items=1 << 18, shape=(1 << 18,))
    found = dictionary({f"w{i}": entry for i in range(2000)})
    with python_memory_below(64 << 20):
        assert "claim" in refusal(write_file(tmp_path, found, **{"0": big}))


def test_pickle_without_end_is_refused(tmp_path: Path) -> None:
    data = b"\x80\x02" + b"}" * (15 << 20)
    with python_memory_below(256 << 20):
        assert "no end" in refusal(write_zip(tmp_path / "m.pt", data, {}), seconds=60)
    assert "larger than" in refusal(write_zip(tmp_path / "m.pt", data * 2, {}))


def test_container_that_contains_itself_is_refused(tmp_path: Path) -> None:
    found = b"}q\x00" + text("state_dict") + b"h\x00s"
    assert "no tensors" in refusal(write_file(tmp_path, found))


# The zip archive.


def write_entries(path: Path, *names: str, compress: int = zipfile.ZIP_STORED) -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compress) as archive:
        warnings.simplefilter("ignore")  # two entries of the same name
        archive.writestr("archive/data.pkl", pickle_of(dictionary({"w": make_tensor()})))
        archive.writestr("archive/data/0", FLOATS)
        for entry in names:
            archive.writestr(entry, bytes(1 << 20))
    return path


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("../evil", "is not a plain name"),
        ("archive/data/../../evil", "is not a plain name"),
        ("/etc/evil", "is not a plain name"),
        ("archive\\..\\evil", "is not a plain name"),
        ("archive/data/0", "have the same name"),
        ("other/data.pkl", "2 entries data.pkl"),
        ("archive/constants.pkl", "TorchScript"),
    ],
)
def test_unsafe_entry_names_are_refused(entry: str, message: str, tmp_path: Path) -> None:
    path = write_entries(tmp_path / "m.pt", entry.replace("\\", "|"))
    data = path.read_bytes().replace(entry.replace("\\", "|").encode(), entry.encode())
    path.write_bytes(data)
    assert message in refusal(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.pt"]


def test_zip_bomb_is_refused_unopened(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle_of(dictionary({"w": make_tensor()})))
        with archive.open("archive/data/0", "w", force_zip64=True) as entry:
            for _ in range(256):
                entry.write(bytes(1 << 20))
    with python_memory_below(8 << 20):
        assert "compressed" in refusal(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(pickle.dumps({"w": 1}, protocol=2))
    assert "before PyTorch 1.6" in refusal(path)
    for data in (b"", b"GGUF", b"PK\x03\x04", b"PK\x05\x06" + bytes(18)):
        path.write_bytes(data)
        refusal(path)
    refusal(tmp_path / "none.pt")
    write_zip(path, pickle_of(dictionary({"w": make_tensor()})), {"0": FLOATS}, byteorder=b"big")
    assert "byte order" in refusal(path)
    write_zip(path, pickle_of(dictionary({"lr": integer(1)})), {})
    assert "holds no tensors, only lr" in refusal(path)
    write_zip(path, b"\x80\x02}", {})
    refusal(path)


def test_damaged_files_never_crash(tmp_path: Path) -> None:
    whole = write_torch(tmp_path / "m.pt", {"a": np.ones((3, 4), np.float32), "b": np.ones(5)})
    data = whole.read_bytes()
    path = tmp_path / "damaged.pt"
    for end in range(0, len(data), 37):
        path.write_bytes(data[:end])
        refusal(path)
    rng = np.random.default_rng(0)
    for _ in range(400):
        broken = bytearray(data)
        for place in rng.integers(0, len(data), rng.integers(1, 4)):
            broken[place] = rng.integers(0, 256)
        path.write_bytes(bytes(broken))
        try:
            read_torch(path)
        except CheckpointError as error:
            assert "\n" not in str(error)


def test_random_pickles_never_crash(tmp_path: Path) -> None:
    data = pickle_of(dictionary({"a": make_tensor(), "b": make_tensor(shape=(4,))}))
    rng = np.random.default_rng(1)
    for _ in range(2000):
        broken = bytearray(data)
        for place in rng.integers(0, len(data), rng.integers(1, 6)):
            broken[place] = rng.integers(0, 256)
        try:
            read_torch(write_zip(tmp_path / "m.pt", bytes(broken), {"0": FLOATS}))
        except CheckpointError as error:
            assert "\n" not in str(error)
