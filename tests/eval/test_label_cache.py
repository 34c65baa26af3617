"""Cache of zero-shot classifiers: keys, damaged and hostile entries."""

import os
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from standin import WIDTH, StandIn, StandInProcessor, paint

import mlx_mobileclip
from mlx_mobileclip.__main__ import main
from mlx_mobileclip.caching import disk_cache
from mlx_mobileclip.caching.disk_cache import DiskCache
from mlx_mobileclip.embedding import identity
from mlx_mobileclip.embedding.embed_to_file import embed_texts
from mlx_mobileclip.embedding.identity import text_identity
from mlx_mobileclip.errors import DataError
from mlx_mobileclip.eval import zero_shot as zeroshot
from mlx_mobileclip.preprocess import tokenizer
from mlx_mobileclip.preprocess.processor import Processor
from mlx_mobileclip.preprocess.tokenizer import Tokenizer, clip_tokenizer

TEMPLATES = ("a photo of a {}.", "a {} thing", "{} {}")
LABELS = ["red", "green", "blue", "a {} brace"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLX_MOBILECLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model() -> StandIn:
    return StandIn()


def classifier(model: StandIn, **changes: object) -> np.ndarray:
    options = {"labels": LABELS, "templates": TEMPLATES} | changes
    return np.array(zeroshot.build_zero_shot_classifier(model, StandInProcessor(), **options))


def test_cached_classifier_is_reused_for_equal_inputs_only(model: StandIn, cache: Path) -> None:
    first = classifier(model)
    seen = model.texts_seen
    assert np.array_equal(classifier(model), first)
    assert np.array_equal(classifier(StandIn()), first)
    assert model.texts_seen == seen
    assert len(list(cache.iterdir())) == 1
    classifier(model, labels=LABELS[::-1])
    classifier(model, templates=TEMPLATES[:2])
    assert len(list(cache.iterdir())) == 3
    other = classifier(StandIn(seed=5))
    assert not np.allclose(other, first)
    model.config.text = "another mask"
    classifier(model)
    assert len(list(cache.iterdir())) == 5


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "grow", "directory"])
def test_damaged_entry_is_recomputed(model: StandIn, cache: Path, damage: str) -> None:
    first = classifier(model)
    (entry,) = cache.iterdir()
    data = bytearray(entry.read_bytes())
    if damage == "flip":
        data[40] ^= 1
    elif damage == "cut":
        del data[-4:]
    elif damage == "empty":
        data.clear()
    elif damage == "grow":
        data += bytes(48)
    entry.unlink()
    if damage == "directory":
        entry.mkdir()
    else:
        entry.write_bytes(data)
    assert np.array_equal(classifier(model), first)
    if damage != "directory":
        seen = model.texts_seen
        assert np.array_equal(classifier(model), first)
        assert model.texts_seen == seen, "the entry was not rewritten"


def test_renamed_entry_is_ignored(model: StandIn, cache: Path) -> None:
    classifier(model)
    (entry,) = cache.iterdir()
    entry.rename(cache / ("0" * 64 + entry.suffix))
    assert DiskCache(cache).read(entry.stem, len(LABELS), WIDTH) is None
    assert DiskCache(cache).read("0" * 64, len(LABELS), WIDTH) is None


def test_cache_size_is_bounded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DiskCache(cache, max_bytes=1000)
    cache.mkdir()
    stale, foreign = cache / "killed.matrix-partial", cache / "photo.jpg"
    for path in (stale, foreign):  # a user may name a directory that holds other files
        path.write_bytes(bytes(2000))
        os.utime(path, (1, 1))
    for i in range(6):
        store.write(f"{i:064}", np.full((10, 8), i, np.float32))
        os.utime(cache / f"{i:064}.matrix", (100 + i, 100 + i))
    remaining = {path.name for path in cache.iterdir()}
    assert remaining == {"photo.jpg", f"{4:064}.matrix", f"{5:064}.matrix"}
    monkeypatch.setattr(disk_cache, "MAX_ENTRY_BYTES", 100)
    store.write("f" * 64, np.zeros((10, 8), np.float32))
    assert not (cache / ("f" * 64 + ".matrix")).exists()


def test_hostile_entries_are_ignored(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a pipe would block, and a device has no end."""
    monkeypatch.setattr(disk_cache, "MAX_ENTRY_BYTES", 1 << 20)
    cache.mkdir()
    os.mkfifo(cache / "pipe.matrix")
    (cache / "endless.matrix").symlink_to("/dev/zero")
    with (cache / "huge.matrix").open("wb") as file:
        file.truncate(disk_cache.MAX_ENTRY_BYTES + 1)
    for key in ("pipe", "endless", "huge"):
        assert DiskCache(cache).read(key, 4, 2) is None
    DiskCache(cache).write("pipe", np.ones((4, 2), np.float32))
    stored = DiskCache(cache).read("pipe", 4, 2)
    assert stored is not None and np.array_equal(stored, np.ones((4, 2)))


def test_unwritable_cache_is_ignored(
    model: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLX_MOBILECLIP_CACHE", str(tmp_path / "file" / "below"))
    assert classifier(model).shape[0] == len(LABELS)


def test_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLX_MOBILECLIP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert zeroshot.cache_directory() == tmp_path / "mlx-mobileclip"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert zeroshot.cache_directory() == Path.home() / ".cache" / "mlx-mobileclip"


def test_missing_home_directory_disables_the_cache(
    model: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    monkeypatch.delenv("MLX_MOBILECLIP_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert zeroshot.cache_directory() is None
    assert classifier(model).shape[0] == len(LABELS)


MERGES = [("t", "h"), ("th", "e</w>"), ("h", "e</w>")]


def test_key_depends_on_all_that_determines_the_ids(
    model: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(merges: Any = MERGES, length: int = 77) -> str:
        processor: Any = SimpleNamespace(tokenizer=Tokenizer(merges, length))
        return text_identity(model, processor)

    keys = [
        key(),
        key(MERGES[::-1][:1] + MERGES[:1]),
        key(MERGES[:1] + MERGES[:0:-1]),
        key(length=9),
    ]
    assert key() == keys[0]
    monkeypatch.setattr(tokenizer, "_text_fixer", lambda: tokenizer._fix_text)  # without ftfy
    keys.append(key())
    monkeypatch.undo()
    monkeypatch.setattr("ftfy.__version__", "0")
    keys.append(key())
    monkeypatch.undo()
    monkeypatch.setattr(identity, "__version__", "0")
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_resume_log_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    class Interrupted(StandIn):
        def encode_text(self, ids: Any, normalize: bool = True) -> Any:
            if self.texts_seen:
                raise KeyboardInterrupt
            return super().encode_text(ids, normalize)

    other = StandInProcessor()
    other.tokenizer.fingerprint = "other"
    texts, output = ["red", "green"], tmp_path / "x.npz"
    with pytest.raises(KeyboardInterrupt):
        embed_texts(Interrupted(), StandInProcessor(), texts, output, batch_size=1)
    with pytest.raises(DataError, match="other weights, settings or version"):
        embed_texts(StandIn(), other, texts, output)
    assert embed_texts(StandIn(), StandInProcessor(), texts, output).resumed == 1


@pytest.mark.parametrize(
    ("dtype", "shape"), [("float16", (4, 6)), ("float32", (6, 4)), ("float32", (24, 1))]
)
def test_entry_of_another_shape_or_dtype_is_ignored(
    cache: Path, dtype: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although its length and digest are right."""
    store = DiskCache(cache)
    with monkeypatch.context() as patch:
        patch.setattr(disk_cache, "DTYPE", dtype.encode())
        store.write("a", np.ones(shape, np.float32))
    assert store.read("a", 4, 6) is None
    store.write("a", np.ones((4, 6), np.float32))
    assert store.read("a", 4, 6) is not None


@pytest.mark.parametrize("forged", ["width", "nan", "infinite", "length"])
def test_entry_with_a_valid_digest_is_checked(model: StandIn, cache: Path, forged: str) -> None:
    first = classifier(model)
    (entry,) = cache.iterdir()
    bad = np.hstack([first, first]) / np.sqrt(2) if forged == "width" else first.copy()
    if forged != "width":
        bad[1] = {"nan": np.nan, "infinite": np.inf, "length": 0.5}[forged]
    DiskCache(cache).write(entry.stem, bad)
    assert np.array_equal(classifier(model), first)
    assert DiskCache(cache).read(entry.stem, len(LABELS), WIDTH, unit=True) is not None


@pytest.mark.parametrize(
    ("mode", "owner", "used"),
    [
        *((0o700, 0, True), (0o755, 0, True), (0o1777, 0, True), (0o770, 0, False)),
        *((0o702, 0, False), (0o700, 1, False), (0o1777, 1, False)),
    ],
)
def test_directory_writable_by_others_is_not_used(
    model: StandIn,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: int,
    owner: int,
    used: bool,
) -> None:
    cache.mkdir()
    cache.chmod(mode)
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + owner)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            classifier(model)
    assert [str(w.message).endswith("choose another") for w in caught] == [True] * (not used)
    assert bool(list(cache.iterdir())) == used
    monkeypatch.undo()


def test_entry_writable_by_others_is_not_used(model: StandIn, cache: Path) -> None:
    first = classifier(model)
    (entry,) = cache.iterdir()
    DiskCache(cache).write(entry.stem, -first)
    entry.chmod(0o666)
    assert np.array_equal(classifier(model), first)


def test_unused_cache_directory_is_only_a_warning(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mlx_mobileclip, "load", lambda *_, **__: (StandIn(), StandInProcessor()))
    cache.mkdir()
    cache.chmod(0o777)
    args = ["classify", "--image", paint(tmp_path / "a.png", "red"), "--labels", "red", "--quiet"]
    assert main(args) == 0
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and err[0].startswith("warning: ") and "not used as a cache" in err[0]


def test_cache_on_a_read_only_file_system_is_used(
    model: StandIn, cache: Path, monkeypatch: Any
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    classifier(model)
    monkeypatch.setattr(os, "utime", refuse)
    seen = model.texts_seen
    classifier(model)
    assert model.texts_seen == seen


def test_long_label_warns_each_time(model: StandIn) -> None:
    class Real(StandInProcessor):
        def __init__(self) -> None:
            self.tokenizer: Any = clip_tokenizer()

        def texts(self, texts: list[str]) -> Any:
            return Processor.texts(self, texts)  # type: ignore[arg-type]

    for label in ("very " * 80 + "long", "\u4e00" * 70, "&amp;" + "x " * 80):
        for _ in range(3):
            with pytest.warns(UserWarning, match="the model reads the first 75"):
                zeroshot.build_zero_shot_classifier(model, Real(), ["red", label])
    zeroshot.build_zero_shot_classifier(model, Real(), ["red"])
    zeroshot.build_zero_shot_classifier(model, Real(), ["red"])
