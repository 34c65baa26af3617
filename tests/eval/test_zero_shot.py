"""Zero-shot classification: the ensemble against numpy, the cache against damage."""

import json
import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from standin import StandIn, StandInProcessor, paint

from mlx_mobileclip.caching import disk_cache
from mlx_mobileclip.caching.disk_cache import DiskCache
from mlx_mobileclip.errors import DataError, ImageError, ModelError
from mlx_mobileclip.eval import zero_shot as zeroshot

DATA = Path(__file__).parents[2] / "mlx_mobileclip/data"
TEMPLATES = ("a photo of a {}.", "a {} thing", "{} {}")
LABELS = ["red", "green", "blue", "a {} brace"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLX_MOBILECLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model() -> StandIn:
    return StandIn()


def reference(model: StandIn, labels: list[str], templates: tuple[str, ...]) -> np.ndarray:
    """normalise each prompt, mean, normalise; one label at a time, in float64."""
    rows = []
    for label in labels:
        prompts = [label.join(template.split("{}")) for template in templates]
        raw = model.encode_text(StandInProcessor().texts(prompts), normalize=False)
        units = np.array(raw, np.float64)
        units /= np.sqrt((units**2).sum(1, keepdims=True))
        mean = units.mean(0)
        rows.append(mean / np.sqrt((mean**2).sum()))
    return np.array(rows)


def test_data_is_what_openai_published() -> None:
    classes = zeroshot.imagenet_classes()
    assert len(classes) == 1000
    assert (classes[0], classes[207], classes[999]) == ("tench", "Golden Retriever", "toilet paper")
    assert len(set(zeroshot.template_set("openai"))) == 80
    assert len(set(zeroshot.template_set("simple"))) == 7
    assert all(t.count("{}") == 1 for s in ("openai", "simple") for t in zeroshot.template_set(s))
    with pytest.raises(DataError, match="openai or simple"):
        zeroshot.template_set("../secret")


@pytest.mark.parametrize("per_batch", [1, 3, 4, 1000])
def test_ensemble_equals_the_formula(
    model: StandIn, per_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zeroshot, "PROMPTS_PER_BATCH", per_batch)
    steps: list[int] = []
    matrix = zeroshot.text_matrix(
        model, StandInProcessor(), LABELS, TEMPLATES, cache=False, on_progress=steps.append
    )
    np.testing.assert_allclose(np.array(matrix), reference(model, LABELS, TEMPLATES), atol=1e-6)
    assert sum(steps) == len(LABELS)


def test_classify(model: StandIn, tmp_path: Path) -> None:
    images = [paint(tmp_path / f"{c}.png", c) for c in ("blue", "red", "green")]
    results = zeroshot.classify(
        model, StandInProcessor(), images, LABELS, templates=TEMPLATES, top_k=3, batch_size=2
    )
    assert [best[0].label for best in results] == ["blue", "red", "green"]
    assert [len(best) for best in results] == [3, 3, 3]
    pixels = StandInProcessor().images(images)
    cosines = np.array(model.encode_image(pixels)) @ reference(model, LABELS, TEMPLATES).T
    chances = np.exp(50 * cosines) / np.exp(50 * cosines).sum(1, keepdims=True)
    for row, best in enumerate(results):
        for p in best:
            assert p.label == LABELS[p.index]
            assert p.similarity == pytest.approx(cosines[row, p.index], abs=1e-5)
            assert p.probability == pytest.approx(chances[row, p.index], rel=1e-3)
        assert [p.probability for p in best] == sorted((p.probability for p in best), reverse=True)


def test_scale_is_clipped_and_ties_keep_the_order(model: StandIn, tmp_path: Path) -> None:
    model.logit_scale = mx.array(20.0)
    image = paint(tmp_path / "a.png", "red")
    (best,) = zeroshot.classify(model, StandInProcessor(), [image], ["red", "blue", "red"])
    assert [p.index for p in best] == [0, 2, 1]
    assert best[0].probability == best[1].probability == pytest.approx(0.5)


def test_refusals(model: StandIn, tmp_path: Path) -> None:
    processor = StandInProcessor()
    image = paint(tmp_path / "a.png", "red")
    for labels, templates, match in (
        ([], TEMPLATES, "no labels"),
        ("cat", TEMPLATES, "no labels"),
        (["cat"], [], "no templates"),
        (["cat"], ["a photo"], "has no {}"),
    ):
        with pytest.raises(DataError, match=match):
            zeroshot.text_matrix(model, processor, labels, templates)
    with pytest.raises(DataError, match="at least 1"):
        zeroshot.classify(model, processor, [image], ["cat"], top_k=0)
    with pytest.raises(DataError, match="2 labels"):
        zeroshot.classify(model, processor, [image], ["a", "b"], texts=mx.zeros((3, 4)))
    with pytest.raises(ImageError, match="no such file"):
        zeroshot.classify(model, processor, [str(tmp_path / "none.png")], ["cat"])
    image_only = StandIn()
    image_only.text = None
    with pytest.raises(ModelError, match="image tower only"):
        zeroshot.text_matrix(image_only, processor, ["cat"])
    with pytest.raises(ModelError, match="image tower only"):
        zeroshot.classify(image_only, processor, [image], ["cat"], texts=mx.zeros((1, 4)))
    model.text.weight = mx.full(model.text.weight.shape, float("nan"))
    with pytest.raises(ModelError, match="float32"):
        zeroshot.text_matrix(model, processor, ["cat"])


# The cache.


def matrix(model: StandIn, **changes: object) -> np.ndarray:
    options = {"labels": LABELS, "templates": TEMPLATES} | changes
    return np.array(zeroshot.text_matrix(model, StandInProcessor(), **options))


def test_cache_saves_the_work_and_knows_its_content(model: StandIn, cache: Path) -> None:
    first = matrix(model)
    seen = model.texts_seen
    assert np.array_equal(matrix(model), first)
    assert np.array_equal(matrix(StandIn()), first)
    assert model.texts_seen == seen
    assert len(list(cache.iterdir())) == 1
    matrix(model, labels=LABELS[::-1])
    matrix(model, templates=TEMPLATES[:2])
    assert len(list(cache.iterdir())) == 3
    other = matrix(StandIn(seed=5))
    assert not np.allclose(other, first)
    model.config.text = "another mask"
    matrix(model)
    assert len(list(cache.iterdir())) == 5


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "grow", "directory"])
def test_damaged_entry_counts_as_absent(model: StandIn, cache: Path, damage: str) -> None:
    first = matrix(model)
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
    assert np.array_equal(matrix(model), first)
    if damage != "directory":
        seen = model.texts_seen
        assert np.array_equal(matrix(model), first)
        assert model.texts_seen == seen, "the entry was not rewritten"


def test_renamed_entry_is_refused(model: StandIn, cache: Path) -> None:
    matrix(model)
    (entry,) = cache.iterdir()
    entry.rename(cache / ("0" * 64 + entry.suffix))
    assert DiskCache(cache).read(entry.stem, len(LABELS)) is None
    assert DiskCache(cache).read("0" * 64, len(LABELS)) is None


def test_cache_is_bounded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DiskCache(cache, max_bytes=1000)
    cache.mkdir()
    stale, foreign = cache / "killed.matrix-partial", cache / "photo.jpg"
    for path in (stale, foreign):  # a user may name a directory that holds other files
        path.write_bytes(bytes(2000))
        os.utime(path, (1, 1))
    for i in range(6):
        store.write(f"{i:064}", np.full((10, 8), i, np.float32))
        os.utime(cache / f"{i:064}.matrix", (100 + i, 100 + i))
    kept = {path.name for path in cache.iterdir()}
    assert kept == {"photo.jpg", f"{4:064}.matrix", f"{5:064}.matrix"}
    monkeypatch.setattr(disk_cache, "MAX_ENTRY_BYTES", 100)
    store.write("f" * 64, np.zeros((10, 8), np.float32))
    assert not (cache / ("f" * 64 + ".matrix")).exists()


def test_hostile_entries_end_within_bounds(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe would be waited for, a device read without end."""
    monkeypatch.setattr(disk_cache, "MAX_ENTRY_BYTES", 1 << 20)
    cache.mkdir()
    os.mkfifo(cache / "pipe.matrix")
    (cache / "endless.matrix").symlink_to("/dev/zero")
    with (cache / "huge.matrix").open("wb") as file:
        file.truncate(disk_cache.MAX_ENTRY_BYTES + 1)
    for key in ("pipe", "endless", "huge"):
        assert DiskCache(cache).read(key, 4) is None
    DiskCache(cache).write("pipe", np.ones((4, 2), np.float32))
    stored = DiskCache(cache).read("pipe", 4)
    assert stored is not None and np.array_equal(stored, np.ones((4, 2)))


def test_unwritable_cache_is_no_error(
    model: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLX_MOBILECLIP_CACHE", str(tmp_path / "file" / "below"))
    assert matrix(model).shape[0] == len(LABELS)


def test_cache_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLX_MOBILECLIP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert zeroshot.cache_directory() == tmp_path / "mlx-mobileclip"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert zeroshot.cache_directory() == Path.home() / ".cache" / "mlx-mobileclip"


def test_data_files_name_their_source() -> None:
    for name in ("imagenet_classes.json", "imagenet_templates.json"):
        data = json.loads((DATA / name).read_text())
        assert "openai/CLIP" in data["source"]
        assert data["licence"].startswith("MIT")


@pytest.mark.parity
def test_parity_with_open_clip(model: StandIn) -> None:
    """open_clip's own classifier builder, run on the stand-in's embeddings."""
    from unittest.mock import patch

    import torch

    with patch("torch.library.register_fake", lambda *_, **__: lambda f: f):
        import torchvision  # noqa: F401
    from open_clip import (
        IMAGENET_CLASSNAMES,
        OPENAI_IMAGENET_TEMPLATES,
        SIMPLE_IMAGENET_TEMPLATES,
        build_zero_shot_classifier,
    )

    assert zeroshot.imagenet_classes() == tuple(IMAGENET_CLASSNAMES)
    pairs = {"openai": OPENAI_IMAGENET_TEMPLATES, "simple": SIMPLE_IMAGENET_TEMPLATES}
    for name, functions in pairs.items():
        assert zeroshot.template_set(name) == tuple(f("{}") for f in functions)

    class Torch:
        def encode_text(self, ids: torch.Tensor, normalize: bool) -> torch.Tensor:
            rows = model.encode_text(mx.array(ids.numpy()), normalize=normalize)
            return torch.from_numpy(np.array(rows))

    def tokenize(texts: list[str]) -> torch.Tensor:
        return torch.from_numpy(np.array(StandInProcessor().texts(texts)))

    labels = list(IMAGENET_CLASSNAMES[:50])
    theirs = build_zero_shot_classifier(Torch(), tokenize, labels, OPENAI_IMAGENET_TEMPLATES)
    ours = zeroshot.text_matrix(
        model, StandInProcessor(), labels, zeroshot.template_set("openai"), cache=False
    )
    np.testing.assert_allclose(np.array(ours), theirs.numpy().T, atol=1e-6)
