"""Small PyTorch files made to be slow to read are refused within limits of time and memory."""

import struct
import threading
import time
import warnings
from pathlib import Path

import mlx.core as mx
import pytest
from python_memory import python_memory_below
from torch_file import (
    contiguous,
    dictionary,
    integer,
    pickle_of,
    storage,
    tensor,
    text,
    write_torch,
    write_zip,
)

from mlx_mobileclip import CheckpointError, load
from mlx_mobileclip.checkpoints.torch_pickle import WRAPPERS, read_torch

FLOATS = struct.pack("<4f", 1, 2, 3, 4)


def short_string(value: int) -> bytes:
    """The pickle of a distinct short string."""
    data = b"%x" % value
    return b"\x8c" + bytes([len(data)]) + data


def colliding_keys(count: int) -> bytes:
    """A dictionary of integers with equal hashes."""
    prime = (1 << 61) - 1  # Python's integers are hashed modulo this
    return b"}(" + b"".join(integer(i * prime) + b"N" for i in range(1, count)) + b"u"


def all_wrappers(count: int) -> bytes:
    """A dictionary of empty dictionaries, under every usual wrapper name."""
    inner = b"}q\x00(" + b"".join(short_string(i) + b"}" for i in range(count)) + b"u"
    return b"}(" + text("x") + inner + b"".join(text(k) + b"h\x00" for k in WRAPPERS) + b"u"


def long_names(count: int) -> bytes:
    """Many globals with a name of 4 MB."""
    return text("y" * 4_000_000) + b"q\x00" + b"h\x00h\x00\x930" * count


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (colliding_keys(30_000), "holds no tensors"),
        (all_wrappers(200_000), "holds no tensors"),
        (long_names(100_000), "a name that is too long"),
        (b"ca\n" + b"x" * 8_000_000 + b"\n", "a name that is too long"),
    ],
    ids=["colliding keys", "all wrappers", "long names", "long name"],
)
def test_costly_pickles_are_refused_quickly(value: bytes, message: str, tmp_path: Path) -> None:
    path = write_zip(tmp_path / "m.pt", pickle_of(value), {})
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=message):
        read_torch(path)
    assert time.perf_counter() - started < 5


def test_huge_zip_directory_is_not_parsed(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "m.pt", pickle_of(dictionary({})), {})
    data = path.read_bytes()
    end = data.rfind(b"PK\x05\x06")
    (start,) = struct.unpack("<I", data[end + 16 : end + 20])
    numbers = (20, 3, 20, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0)
    entry = struct.pack("<4s4B4HL2L5H2L", b"PK\x01\x02", *numbers) + b"a"
    directory = data[start:end] + entry * 300_000
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, len(directory), start, 0)
    path.write_bytes(data[:start] + directory + tail)
    with (
        python_memory_below(16 << 20),
        pytest.raises(CheckpointError, match="directory of entries is larger than 4 MB"),
    ):
        read_torch(path)


def write_large_storage(path: Path, name: str, shape: tuple[int, ...], offset: int = 0) -> Path:
    """Write a file with one tensor in a storage of 64 MB."""
    data = storage("0", "FloatStorage", 16 << 20)
    value = dictionary({name: tensor(data, offset, shape, contiguous(shape))})
    return write_zip(path, pickle_of(value), {"0": bytes(64 << 20)})


@pytest.mark.parametrize("name", ["unknown", "image_encoder.model.network.0.num_batches_tracked"])
def test_no_data_is_read_before_names_and_shapes_are_checked(name: str, tmp_path: Path) -> None:
    path = write_large_storage(tmp_path / "m.pt", name, (16 << 20,))
    mx.reset_peak_memory()
    held = mx.get_active_memory()  # by what ran before in this process
    with (
        python_memory_below(8 << 20),
        pytest.raises(CheckpointError, match="named like no known MobileCLIP"),
    ):
        load(path, variant="MobileCLIP-S0")
    assert mx.get_peak_memory() - held < 8 << 20


def test_only_the_viewed_part_of_a_storage_is_read(tmp_path: Path) -> None:
    path = write_large_storage(tmp_path / "m.pt", "w", (4,), offset=1000)
    with python_memory_below(8 << 20):
        assert read_torch(path)["w"].tolist() == [0, 0, 0, 0]


def test_views_of_one_storage_are_read(tmp_path: Path) -> None:
    data = storage("0", "FloatStorage", 4)
    views = {
        "last": (3, (1,), (1,)),
        "all": (0, (4,), (1,)),
        "middle": (1, (2,), (1,)),
        "even": (0, (2,), (2,)),
        "first": (0, (1,), (1,)),
    }
    value = dictionary({name: tensor(data, *view) for name, view in views.items()})
    read = read_torch(write_zip(tmp_path / "m.pt", pickle_of(value), {"0": FLOATS}))
    assert {name: value.tolist() for name, value in read.items()} == {
        "last": [4], "all": [1, 2, 3, 4], "middle": [2, 3], "even": [1, 3], "first": [1],
    }  # fmt: skip


def test_tensor_scattered_over_its_storage_is_refused(tmp_path: Path) -> None:
    data = storage("0", "FloatStorage", 1 << 20)
    value = dictionary({"w": tensor(data, 0, (2,), ((1 << 20) - 1,))})
    path = write_zip(tmp_path / "m.pt", pickle_of(value), {"0": bytes(4 << 20)})
    with pytest.raises(CheckpointError, match="w has 8 bytes, scattered over 4194304"):
        read_torch(path)


def test_wrong_checksum_is_refused(tmp_path: Path) -> None:
    path = write_zip(
        tmp_path / "m.pt",
        pickle_of(dictionary({"w": tensor(storage("0", "FloatStorage", 4), 0, (4,), (1,))})),
        {"0": FLOATS},
    )
    path.write_bytes(path.read_bytes().replace(FLOATS, FLOATS[::-1]))
    with pytest.raises(CheckpointError, match="Bad CRC"):
        read_torch(path)


def test_threads_keep_the_warning_filters(tmp_path: Path) -> None:
    keys = b"".join(text(f"k{i}") + b"N" for i in range(5000))
    path = write_zip(tmp_path / "m.pt", pickle_of(b"}(" + keys + b"u"), {})
    before, seen = list(warnings.filters), []

    def read() -> None:
        for _ in range(5):
            with pytest.raises(CheckpointError):
                read_torch(path)
            seen.append(list(warnings.filters))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 20 and all(filters == before for filters in seen)


def test_files_without_tensors_are_refused(tmp_path: Path) -> None:
    mx.save_safetensors(str(tmp_path / "m.safetensors"), {})
    with pytest.raises(CheckpointError, match="named like no known MobileCLIP"):
        load(tmp_path / "m.safetensors", variant="MobileCLIP-S0")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        load(write_torch(tmp_path / "m.pt", {}), variant="MobileCLIP-S0")
