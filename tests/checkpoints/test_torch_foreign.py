"""Other objects in a PyTorch file are neither created nor mistaken for tensors."""

import argparse
import collections
import pickle
import struct
import zipfile
from enum import Enum
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch_file import (
    contiguous,
    dictionary,
    integer,
    name,
    pickle_of,
    storage,
    tensor,
    text,
    tuple_of,
    write_zip,
)

from mlx_mobileclip import CheckpointError
from mlx_mobileclip.checkpoints.torch_pickle import read_torch

FLOATS = struct.pack("<4f", 1, 2, 3, 4)
DOUBLES = struct.pack("<4d", 1, 2, 3, 4)


class Colour(Enum):
    RED = 1


class Slots:
    __slots__ = ("a",)

    def __init__(self) -> None:
        self.a = 1


class AttributeDict(dict[str, int]):
    """Like Lightning's AttributeDict."""


class ListSubclass(list[int]):
    pass


LOOP: tuple[list[Any]] = ([],)
LOOP[0].append(LOOP)  # a tuple that contains itself
FOREIGN: dict[str, Any] = {
    "namespace": argparse.Namespace(lr=1e-3, opt="adamw", betas=(0.9, 0.98)),
    "scalar": np.float64(0.75),
    "integer": np.int64(3),
    "array": np.arange(6.0).reshape(2, 3),
    "dtype": np.dtype("float32"),
    "path": Path("runs") / "one",
    "set": {1, 2},
    "frozenset": frozenset("ab"),
    "enum": Colour.RED,
    "defaultdict": collections.defaultdict(int, a=1),
    "deque": collections.deque([1, 2], maxlen=3),
    "counter": collections.Counter("aab"),
    "fraction": Fraction(1, 3),
    "complex": 1 + 2j,
    "bytes": b"\x00\xff" * 20,
    "long bytes": b"\x00\xff" * 2000,
    "slots": Slots(),
    "bag": AttributeDict(a=1),
    "pile": ListSubclass([1, 2]),
    "function": print,
    "class": Colour,
    "generator": np.random.default_rng(0),
    "history": {("train", 1): 0.5, None: 1, 0.5: 2, Colour.RED: 3, b"a": 4, Path("a"): 5},
    "loop": LOOP,
}


def make_tensor(kind: str = "FloatStorage", shape: tuple[int, ...] = (2, 2)) -> bytes:
    return tensor(storage("0", kind, 4), 0, shape, contiguous(shape))


def body(value: Any, protocol: int) -> bytes:
    """The pickle instructions of a value, without header, frame and end."""
    data = pickle.dumps(value, protocol=protocol)
    return data[2:-1] if protocol < 4 or data[2:3] != b"\x95" else data[11:-1]


def write_file(folder: Path, found: bytes, data: bytes = FLOATS) -> Path:
    return write_zip(folder / "m.pt", pickle_of(found), {"0": data})


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("what", FOREIGN)
def test_foreign_objects_beside_the_weights_are_ignored(
    what: str, protocol: int, tmp_path: Path
) -> None:
    outer = {"args": body(FOREIGN[what], protocol), "state_dict": dictionary({"w": make_tensor()})}
    found = read_torch(write_file(tmp_path, dictionary(outer, ordered=False)))
    assert list(found) == ["w"] and found["w"].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("what", ["namespace", "scalar", "path", "set", "bag"])
def test_foreign_objects_among_the_tensors_are_refused(what: str, tmp_path: Path) -> None:
    inner = dictionary({"v.w": make_tensor(), "v.x": body(FOREIGN[what], 2)})
    for found in (inner, dictionary({"state_dict": inner})):
        with pytest.raises(CheckpointError, match=r"v\.x, among its tensors, is a [\w.]+, which"):
            read_torch(write_file(tmp_path, found))


def test_complex_tensors_are_refused_among_the_weights_only(tmp_path: Path) -> None:
    odd = make_tensor("ComplexFloatStorage")
    beside = dictionary({"state_dict": dictionary({"w": make_tensor()}), "spectrum": odd})
    assert list(read_torch(write_file(tmp_path, beside))) == ["w"]
    with pytest.raises(CheckpointError, match=r"torch\.ComplexFloatStorage"):
        read_torch(write_file(tmp_path, dictionary({"w": make_tensor(), "v": odd})))


def test_pickled_model_is_refused_by_name(tmp_path: Path) -> None:
    model = name("open_clip.model", "CustomTextCLIP") + b")\x81" + dictionary({"a": make_tensor()})
    with pytest.raises(CheckpointError, match=r"open_clip\.model\.CustomTextCLIP.*state_dict"):
        read_torch(write_file(tmp_path, model + b"b"))


def test_float64_is_read_as_float32(tmp_path: Path) -> None:
    found = read_torch(
        write_file(tmp_path, dictionary({"w": make_tensor("DoubleStorage")}), DOUBLES)
    )
    assert str(found["w"].dtype) == "mlx.core.float32" and found["w"].tolist() == [[1, 2], [3, 4]]


def test_parameters_with_state_are_read(tmp_path: Path) -> None:
    hooks = name("collections", "OrderedDict") + b")R"
    state = dictionary({"tag": integer(1)})
    parameter = name("torch._utils", "_rebuild_parameter_with_state")
    parameter += tuple_of(make_tensor(), b"\x88", hooks, state) + b"R"
    assert list(read_torch(write_file(tmp_path, dictionary({"w": parameter})))) == ["w"]


WEIGHTS = dictionary({"visual.w": make_tensor()})
MOMENTS = dictionary({"exp_avg": make_tensor(), "step": make_tensor(shape=(1,))})


@pytest.mark.parametrize(
    "found",
    [
        *({word: WEIGHTS} for word in ("net", "module", "state_dict_ema", "anything", "model_ema")),
        {"model": dictionary({"state_dict": WEIGHTS})},
        {"my_model": WEIGHTS, "optimizer": dictionary({"state": MOMENTS})},
        {"my_model": WEIGHTS, "extra": MOMENTS},
        {"step": make_tensor(shape=(1,)), "my_model": WEIGHTS},
        {"epoch": integer(3), "outer": dictionary({"inner": WEIGHTS})},
        {"state_dict": WEIGHTS, "state_dict_ema": dictionary({"visual.ema": make_tensor()})},
        {"model": text("MobileCLIP2-S0"), "weights": WEIGHTS},
    ],
)
def test_state_dict_is_found(found: dict[str, bytes], tmp_path: Path) -> None:
    for ordered in (False, True):
        path = write_file(tmp_path, dictionary(found, ordered))
        assert list(read_torch(path)) == ["visual.w"]


def test_two_state_dicts_are_refused(tmp_path: Path) -> None:
    both = dictionary({"online": WEIGHTS, "target": WEIGHTS}, ordered=False)
    with pytest.raises(CheckpointError, match=r"2 dictionaries of tensors \(.*online"):
        read_torch(write_file(tmp_path, both))


def test_deeply_nested_wrappers_are_quick(tmp_path: Path) -> None:
    depth = 20_000
    deep = b"".join(b"}" + text("model") for _ in range(depth)) + WEIGHTS + b"s" * depth
    with pytest.raises(CheckpointError):
        read_torch(write_file(tmp_path, deep + b"00"))
    assert list(read_torch(write_file(tmp_path, deep))) == ["visual.w"]


@pytest.mark.parametrize("stem", ["weights (1)", "ep=3,loss=0.5", "best@[x]", "50%", "\u6a21 a"])
def test_file_may_have_any_name(stem: str, tmp_path: Path) -> None:
    """torch.save begins the name of every entry with the file's."""
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        archive.writestr(f"{stem}/data.pkl", pickle_of(WEIGHTS))
        archive.writestr(f"{stem}/data/0", FLOATS)
    assert list(read_torch(tmp_path / "m.pt")) == ["visual.w"]


def test_torchscript_program_is_refused(tmp_path: Path) -> None:
    for entries in (["constants.pkl"], ["code/__torch__/model.py"], ["code/a.py", "constants.pkl"]):
        path = tmp_path / "m.pt"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for entry in entries:
                compressed = zipfile.ZIP_DEFLATED
                archive.writestr(f"model/{entry}", b"def f(): ..." * 50, compressed)
            archive.writestr("model/data.pkl", pickle_of(WEIGHTS))
        with pytest.raises(CheckpointError, match="is a TorchScript program"):
            read_torch(path)
