"""The reinforced loss against numpy, and its data against hostile shards."""

import gzip
import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch_file

from mlx_mobileclip import reinforced_data
from mlx_mobileclip.errors import DataError
from mlx_mobileclip.reinforce import Captions, Teachers, reinforced_loss
from mlx_mobileclip.reinforced_data import read_shard

B, E = 6, 5
TEACHERS = Teachers(widths=(4, 3), scales=(70.0, 60.0))
LOG_SCALE = float(np.log(20.0))


def unit(rng: np.random.Generator, rows: int, width: int) -> np.ndarray:
    values = rng.normal(size=(rows, width)) + 0.8
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def batch(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def stored() -> np.ndarray:
        return np.concatenate([unit(rng, B, width) for width in TEACHERS.widths], axis=1)

    return {
        "images": unit(rng, B, E),
        "true": unit(rng, B, E),
        "synthetic": unit(rng, B, E),
        "teacher_images": stored(),
        "teacher_true": stored(),
        "teacher_synthetic": stored(),
    }


def by_hand(data: dict[str, np.ndarray], kinds: tuple[str, ...], w0: float, w1: float) -> float:
    """The formulas term by term in float64, without a matrix product in sight."""

    def softmax(scores: list[float]) -> list[float]:
        weights = [np.exp(s - max(scores)) for s in scores]
        return [w / sum(weights) for w in weights]

    def dot(a: np.ndarray, b: np.ndarray) -> float:
        return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))

    total = 0.0
    for kind in kinds:
        sides = (data["images"], data["teacher_images"]), (data[kind], data[f"teacher_{kind}"])
        for (mine, theirs), (other, others) in (sides, sides[::-1]):
            for i in range(B):
                student = softmax([20.0 * dot(mine[i], other[j]) for j in range(B)])
                first = softmax([70.0 * dot(theirs[i][:4], others[j][:4]) for j in range(B)])
                second = softmax([60.0 * dot(theirs[i][4:], others[j][4:]) for j in range(B)])
                contrastive = -np.log(student[i])
                distilled = -sum(
                    (p + q) / 2 * np.log(s) for p, q, s in zip(first, second, student, strict=True)
                )
                total += (w0 * contrastive + w1 * distilled) / 2 / B
    return float(total)


def ours(
    data: dict[str, Any], kinds: tuple[str, ...], weights: tuple[float, float], scale: Any = None
) -> mx.array:
    arrays = {name: mx.array(value) for name, value in data.items()}
    captions = [Captions(arrays[kind], arrays[f"teacher_{kind}"]) for kind in kinds]
    return reinforced_loss(
        arrays["images"],
        captions,
        arrays["teacher_images"],
        mx.array(LOG_SCALE) if scale is None else scale,
        teachers=TEACHERS,
        weights=weights,
    )


@pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, 0.0), (0.25, 0.75)])
@pytest.mark.parametrize("kinds", [("true",), ("synthetic",), ("true", "synthetic")])
def test_loss_equals_the_formula(kinds: tuple[str, ...], weights: tuple[float, float]) -> None:
    data = batch()
    loss = ours(data, kinds, weights)
    assert loss.shape == ()
    assert loss.dtype == mx.float32
    assert loss.item() == pytest.approx(by_hand(data, kinds, *weights), rel=1e-5)


def test_gradient_equals_differences() -> None:
    data = batch(3)
    kinds, weights = ("true", "synthetic"), (0.25, 0.75)
    for name in ("images", "true", "synthetic"):

        def loss(value: mx.array, name: str = name) -> mx.array:
            return ours({**data, name: value}, kinds, weights)

        gradient = np.array(mx.grad(loss)(mx.array(data[name])))
        for i, j in ((0, 0), (2, 3), (5, 4)):
            step = np.zeros((B, E))
            step[i, j] = 1e-5
            up = {**data, name: data[name].astype(np.float64) + step}
            down = {**data, name: data[name].astype(np.float64) - step}
            slope = (by_hand(up, kinds, *weights) - by_hand(down, kinds, *weights)) / 2e-5
            assert gradient[i, j] == pytest.approx(slope, rel=1e-3, abs=1e-5)


def test_teachers_get_no_gradient() -> None:
    data = batch()

    def loss(value: mx.array) -> mx.array:
        return ours({**data, "teacher_images": value}, ("true",), (0.0, 1.0))

    gradient = mx.grad(loss)(mx.array(data["teacher_images"]))
    assert not mx.any(gradient != 0).item()


def test_half_precision_embeddings_are_summed_in_float32() -> None:
    data = batch()
    half = {name: mx.array(value).astype(mx.float16) for name, value in data.items()}
    full = {name: np.array(value).astype(np.float32) for name, value in half.items()}
    assert ours(half, ("true",), (0.5, 0.5)).item() == pytest.approx(
        by_hand(full, ("true",), 0.5, 0.5), rel=1e-4
    )


def test_shapes_are_checked() -> None:
    data = batch()
    for name, match in (
        ("true", "texts has shape"),
        ("teacher_true", "teacher_texts has shape"),
        ("teacher_images", "teacher_images has shape"),
    ):
        with pytest.raises(DataError, match=match):
            ours({**data, name: data[name][:, :-1]}, ("true",), (0.0, 1.0))
    with pytest.raises(DataError, match="no captions"):
        ours(data, (), (0.0, 1.0))
    with pytest.raises(DataError, match="each teacher its own"):
        # The published training scripts do this, and fail with an IndexError.
        reinforced_loss(
            mx.zeros((2, 3)),
            [Captions(mx.zeros((2, 3)), mx.zeros((2, 8)))],
            mx.zeros((2, 8)),
            mx.array(0.0),
            teachers=Teachers(widths=(4, 4), scales=(100.0,)),
        )


@pytest.mark.parity
def test_loss_and_gradient_equal_torch() -> None:
    import torch
    from torch.nn import functional

    data = batch(7)
    kinds, weights = ("true", "synthetic"), (0.25, 0.75)
    leaves = {k: torch.tensor(v, dtype=torch.float64) for k, v in data.items()}
    scale = torch.tensor(LOG_SCALE, dtype=torch.float64, requires_grad=True)
    for name in ("images", *kinds):
        leaves[name].requires_grad_(True)

    def shares(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (
            (70 * a[:, :4] @ b[:, :4].T).softmax(1) + (60 * a[:, 4:] @ b[:, 4:].T).softmax(1)
        ) / 2

    total = torch.zeros((), dtype=torch.float64)
    for kind in kinds:
        a, b = leaves["teacher_images"], leaves[f"teacher_{kind}"]
        logits = scale.exp() * leaves["images"] @ leaves[kind].T
        for scores, target in ((logits, shares(a, b)), (logits.T, shares(b, a))):
            total = total + weights[0] / 2 * functional.cross_entropy(scores, torch.arange(B))
            total = total + weights[1] / 2 * functional.cross_entropy(scores, target)
    total.backward()

    def loss(parts: dict[str, mx.array]) -> mx.array:
        return ours(
            {**data, **{n: parts[n] for n in parts if n != "scale"}}, kinds, weights, parts["scale"]
        )

    parts = {name: mx.array(data[name]) for name in ("images", *kinds)}
    value, gradients = mx.value_and_grad(loss)(parts | {"scale": mx.array(LOG_SCALE)})
    assert value.item() == pytest.approx(total.item(), rel=1e-6)
    for name, gradient in gradients.items():
        expected = (scale if name == "scale" else leaves[name]).grad
        assert expected is not None
        worst = np.abs(np.array(gradient) - expected.numpy()).max() / expected.abs().max().item()
        assert worst < 1e-5, (name, worst)


# The reader.

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


def test_read_shard(tmp_path: Path) -> None:
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
    "pickled array": ({"npz": npz(image_emb=np.array([[Gadget()]], object))}, "holds object"),
    "pickle as npz": ({"npz": pickle.dumps(Gadget())}, "damaged .npz"),
    "zip bomb": ({"npz": bomb()}, "unpacks to"),
    "huge shape": (
        {"npz": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (60000, 60000)}")},
        "does not fit",
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
    "integers": ({"npz": npz(image_emb=np.ones((3, 7), np.int64))}, "not floats"),
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
    "json list": ({"syn_json": b"[]"}, "no JSON object"),
    "no synthetic": ({"syn_json": b'{"text": ["a"]}'}, "0 sets"),
    "synthetic numbers": ({"syn_json": b'{"syn_text": [1, 2]}'}, "no list of"),
    "no parameters": ({"paug_json": b"{}"}, "param_aug is no list"),
    "parameters text": ({"paug_json": b'{"param_aug": "[1"}'}, "not valid JSON"),
    "parameters breaking out": (
        {"paug_json": json.dumps({"param_aug": '1, "param_aug": 2'}).encode()},
        "param_aug is no list",
    ),
    "too many": ({"paug_json": augmented(*([[None, None]] * 2000))}, "param_aug is no list"),
    "crop": ({"paug_json": augmented([[0, 0, 0, 5], None])}, "is no crop"),
    "crop of floats": ({"paug_json": augmented([[0, 0, 1.5, 5], None])}, "is no crop"),
    "unknown operation": ({"paug_json": augmented([None, [[14, 0]]])}, "is no operation"),
    "operation by name": ({"paug_json": augmented([None, [["exec", 0]]])}, "is no operation"),
    "nan magnitude": ({"paug_json": b'{"param_aug": [[null, [[1, NaN]]]]}'}, "is no operation"),
    "huge magnitude": (
        {"paug_json": b'{"param_aug": [[null, [[1, 1' + b"0" * 400 + b"]]]]}"},
        "is no operation",
    ),
}


def test_bfloat16_embeddings(tmp_path: Path) -> None:
    """As in the data sets whose name ends in -bf16: a compressed PyTorch file."""
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
def test_hostile_samples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    changes, match = HOSTILE[name]
    path = shard(tmp_path / "0.tar", members(**changes))
    with pytest.raises(DataError, match=match) as raised:
        list(read_shard(path))
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600
    assert "part/00000" in str(raised.value)
    assert not Path("pwned").exists()


def test_hostile_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    # Links and devices are no data, wherever they point.
    with tarfile.open(path, "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("../../etc/0.txt")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    assert list(read_shard(path)) == []


def test_truncated_shard(tmp_path: Path) -> None:
    path = shard(tmp_path / "0.tar", members(), members())
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError):
        list(read_shard(path))
