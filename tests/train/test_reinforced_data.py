"""The reader of reinforced data against hostile shards."""

import gzip
import io
import json
import os
import pickle
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch_file
from python_memory import python_memory_below

from mlx_mobileclip.errors import DataError
from mlx_mobileclip.train import reinforced_data
from mlx_mobileclip.train.reinforced_data import read_shard

WIDTH = 7
PARAMETERS = [
    [[3, 5, 100, 120], [[1, 0.25], [10, 4]]],
    [[0, 0, 10, 10], None],
    [None, [[0, 0.0], [13, 0]]],
]


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def members(**changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "txt": b"a cat",
        "url.txt": b"https://example.org/cat.jpg\n",
        "json": b"{}",
        "syn.json": json.dumps({"syn_text": ["one", "two"]}).encode(),
        "paug.json": json.dumps({"param_aug": json.dumps(PARAMETERS)}).encode(),
        "npz": npz(
            image_emb=rng.normal(size=(3, WIDTH)).astype(np.float32),
            text_emb=rng.normal(size=(3, WIDTH)).astype(np.float16),
        ),
    } | {name.replace("_", "."): value for name, value in changes.items()}


def shard(path: Path, *samples: dict[str, Any]) -> Path:
    with tarfile.open(path, "w") as tar:
        for i, sample in enumerate(samples):
            for suffix, data in sample.items():
                if data is not None:
                    info = tarfile.TarInfo(f"part/{i:05}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return path


def test_shard_is_read(tmp_path: Path) -> None:
    second = members(
        url_txt=None,
        jpg=b"jpeg",
        paug_json=json.dumps({"param_aug": PARAMETERS}).encode(),
        syn_json=json.dumps({"syn_text_a": ["x"], "syn_text_b": ["y", "z"], "other": 1}).encode(),
        npz=npz(
            image_emb=np.ones((3, WIDTH)),
            text_emb=np.full((1, WIDTH), 2.0),
            syn_text_a_emb=np.full((1, WIDTH), 3.0),
            syn_text_b_emb=np.full((2, WIDTH), 4.0),
        ),
    )
    second["pth.gz"] = b"\x1f\x8b never opened"
    first, other = read_shard(shard(tmp_path / "0.tar", members(), second))
    assert first.key == "part/00000"
    assert first.caption == "a cat"
    assert first.url == "https://example.org/cat.jpg"
    assert first.image is None
    assert first.synthetic == {"syn_text": ("one", "two")}
    assert first.image_embeddings.shape == (3, WIDTH)
    assert first.caption_embeddings.shape == (WIDTH,)
    assert first.synthetic_embeddings["syn_text"].shape == (2, WIDTH)
    assert first.image_embeddings.dtype == first.caption_embeddings.dtype == np.float32
    assert first.augmentations[0].crop == (3, 5, 100, 120)
    assert first.augmentations[0].operations == (("ShearX", 0.25), ("Posterize", 4.0))
    assert first.augmentations[1].operations == ()
    assert first.augmentations[2].crop is None
    assert other.image == b"jpeg"
    assert other.url is None
    assert other.augmentations == first.augmentations
    assert {k: v[0, 0] for k, v in other.synthetic_embeddings.items()} == {
        "syn_text_a": 3.0,
        "syn_text_b": 4.0,
    }
    assert other.caption_embeddings[0] == 2.0


class Gadget:
    def __reduce__(self) -> Any:
        return (Path("pwned").touch, ())


def bomb() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("image_emb.npy", bytes(32 << 20))
    return file.getvalue()


def npy(header: str, body: bytes = b"") -> bytes:
    text = header.ljust(117) + "\n"
    data = b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text.encode() + body
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("image_emb.npy", data)
    return file.getvalue()


def augmented(*entries: Any) -> bytes:
    return json.dumps({"param_aug": list(entries)}).encode()


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "pickled array": ({"npz": npz(image_emb=np.array([[Gadget()]], object))}, "contains object"),
    "pickle as npz": ({"npz": pickle.dumps(Gadget())}, "damaged .npz"),
    "zip bomb": ({"npz": bomb()}, "unpacks to"),
    "huge shape": (
        {"npz": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (60000, 60000)}")},
        "does not match",
    ),
    "shape that wraps": (
        {"npz": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296)}")},
        "has shape",
    ),
    "negative shape": (
        {"npz": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -4)}", bytes(16))},
        "has shape",
    ),
    "nested header": ({"npz": npy("(" * 3000)}, "damaged .npz"),
    "code in header": ({"npz": npy("__import__('os').system('true')")}, "damaged .npz"),
    "integers": ({"npz": npz(image_emb=np.ones((3, 7), np.int64))}, "expected floats"),
    "nan": ({"npz": npz(image_emb=np.full((3, 7), np.nan))}, "not finite"),
    "one dimension": ({"npz": npz(image_emb=np.ones(3))}, "has shape"),
    "no text_emb": ({"npz": npz(image_emb=np.ones((3, 7)))}, "no text_emb"),
    "widths": (
        {"npz": npz(image_emb=np.ones((3, 7)), text_emb=np.ones((3, 6)))},
        "captions, embeddings|differ",
    ),
    "too few captions": (
        {"npz": npz(image_emb=np.ones((3, 7)), text_emb=np.ones((5, 7)))},
        "2 captions",
    ),
    "too few images": (
        {"npz": npz(image_emb=np.ones((2, 7)), text_emb=np.ones((3, 7)))},
        "3 augmentations, 2",
    ),
    "truncated zip": ({"npz": npz(image_emb=np.ones((3, 7)))[:-30]}, "damaged .npz"),
    "no npz": ({"npz": None}, "has no .npz"),
    "truncated torch file": ({"npz": None, "pth_gz": gzip.compress(b"PK")[:-4]}, "damaged .pth"),
    "no torch file": ({"npz": None, "pth_gz": gzip.compress(b"\x80\x02")}, "damaged .pth.gz"),
    "torch bomb": ({"npz": None, "pth_gz": gzip.compress(bytes(17 << 20))}, "more than 16 MB"),
    "no captions": ({"txt": None}, "has no .txt"),
    "caption encoding": ({"txt": b"\xff"}, "not UTF-8"),
    "json": ({"syn_json": b"{"}, "not valid JSON"),
    "deep json": ({"syn_json": b'{"syn_text":' * 100_000}, "not valid JSON"),
    "json list": ({"syn_json": b"[]"}, "not a JSON object"),
    "no synthetic": ({"syn_json": b'{"text": ["a"]}'}, "0 sets"),
    "synthetic numbers": ({"syn_json": b'{"syn_text": [1, 2]}'}, "not a list of"),
    "no parameters": ({"paug_json": b"{}"}, "param_aug is not a list"),
    "parameters text": ({"paug_json": b'{"param_aug": "[1"}'}, "not valid JSON"),
    "parameters breaking out": (
        {"paug_json": json.dumps({"param_aug": '1, "param_aug": 2'}).encode()},
        "param_aug is not a list",
    ),
    "too many": ({"paug_json": augmented(*([[None, None]] * 2000))}, "param_aug is not a list"),
    "crop": ({"paug_json": augmented([[0, 0, 0, 5], None])}, "is not a crop"),
    "crop of floats": ({"paug_json": augmented([[0, 0, 1.5, 5], None])}, "is not a crop"),
    "unknown operation": ({"paug_json": augmented([None, [[14, 0]]])}, "is not an operation"),
    "operation by name": ({"paug_json": augmented([None, [["exec", 0]]])}, "is not an operation"),
    "nan magnitude": ({"paug_json": b'{"param_aug": [[null, [[1, NaN]]]]}'}, "is not an operation"),
    "huge magnitude": (
        {"paug_json": b'{"param_aug": [[null, [[1, 1' + b"0" * 400 + b"]]]]}"},
        "is not an operation",
    ),
}


def test_bfloat16_embeddings_are_read(tmp_path: Path) -> None:
    """Data sets with a name in -bf16 store a compressed PyTorch file."""
    rng = np.random.default_rng(0)
    arrays = {"image_emb": rng.random((3, WIDTH)), "text_emb": rng.random((3, WIDTH))}
    arrays = {name: value.astype(np.float32) for name, value in arrays.items()}
    file = torch_file.write_torch(tmp_path / "x.pth", arrays, mx.bfloat16)
    sample = members(npz=None, pth_gz=gzip.compress(file.read_bytes()))
    (read,) = read_shard(shard(tmp_path / "0.tar", sample))
    rounded = {k: np.array(mx.array(v, mx.bfloat16).astype(mx.float32)) for k, v in arrays.items()}
    assert np.array_equal(read.image_embeddings, rounded["image_emb"])
    assert np.array_equal(read.caption_embeddings, rounded["text_emb"][0])
    assert np.array_equal(read.synthetic_embeddings["syn_text"], rounded["text_emb"][1:])


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_samples_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    changes, match = HOSTILE[name]
    path = shard(tmp_path / "0.tar", members(**changes))
    with pytest.raises(DataError, match=match) as raised:
        list(read_shard(path))
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600
    assert "part/00000" in str(raised.value)
    assert not Path("pwned").exists()


def test_hostile_shards_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "0.tar"
    for data in (b"", b"no tar at all" * 100, b"\x1f\x8b" + bytes(600)):
        path.write_bytes(data)
        with pytest.raises(DataError, match="cannot be read"):
            list(read_shard(path))
    with pytest.raises(DataError, match="cannot be read"):
        list(read_shard(tmp_path / "none.tar"))
    monkeypatch.setitem(reinforced_data.MAX_SAMPLE_BYTES, "image", 100)
    shard(path, members(jpg=bytes(101)))
    with pytest.raises(DataError, match="101 bytes"):
        list(read_shard(path))
    # Links and devices are not read, wherever they point.
    with tarfile.open(path, "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("../../etc/0.txt")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    assert list(read_shard(path)) == []


def header(kind: bytes, size: int, name: str = "x") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def extended(fields: dict[str, str], kind: bytes = tarfile.XHDTYPE) -> bytes:
    return tarfile.TarInfo._create_pax_generic_header(fields, kind, "utf-8")


SPARSE = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"}
HEADERS = {
    "extended": header(tarfile.XHDTYPE, 3 << 30),
    "global": header(tarfile.XGLTYPE, 3 << 30),
    "of Solaris": header(tarfile.SOLARIS_XHDTYPE, 3 << 30),
    "long name": header(tarfile.GNUTYPE_LONGNAME, 3 << 30),
    "long link": header(tarfile.GNUTYPE_LONGLINK, 3 << 30),
    "map of holes": extended(SPARSE) + header(tarfile.REGTYPE, 3 << 30, "a.txt"),
    "endless map": extended(SPARSE) + header(tarfile.REGTYPE, 1 << 30) + b"9" * (1 << 20),
    "one after the other": extended({"a": "b"}) * 1000 + header(tarfile.REGTYPE, 0),
    "one within the other": header(tarfile.GNUTYPE_LONGNAME, 1) * 1000,
}


@pytest.mark.parametrize("name", HEADERS)
def test_size_of_headers_is_bounded(name: str, tmp_path: Path) -> None:
    """Sparse files whose headers claim 3 GB."""
    path = tmp_path / "0.tar"
    path.write_bytes(HEADERS[name])
    os.truncate(path, 3 << 30)
    with python_memory_below(20 << 20):
        started = time.perf_counter()
        with pytest.raises(DataError, match=r"too large|cannot be read"):
            list(read_shard(path))
        assert time.perf_counter() - started < 2


def test_memory_for_members_and_headers_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    fields = {str(i): "v" for i in range(1200)}
    empty = [header(tarfile.REGTYPE, 0, f"{i}.other") for i in range(2000)]
    path.write_bytes(extended(fields, tarfile.XGLTYPE) + b"".join(empty) + bytes(1024))
    with python_memory_below(20 << 20):
        started = time.perf_counter()
        assert list(read_shard(path)) == []
        assert time.perf_counter() - started < 5


def test_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "0.tar")
    with pytest.raises(DataError, match="is not a file"):
        list(read_shard(tmp_path / "0.tar"))


def test_truncated_shard_is_refused(tmp_path: Path) -> None:
    path = shard(tmp_path / "0.tar", members(), members())
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError):
        list(read_shard(path))
