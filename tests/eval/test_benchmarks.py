"""The published evaluations on small data."""

import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from standin import COLOURS, StandIn, StandInProcessor, paint

from mlx_mobileclip.errors import DataError, ModelError
from mlx_mobileclip.eval import benchmarks


@pytest.fixture
def no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail when a file is opened for writing or a temporary directory is created."""
    opened = Path.open

    def read_only(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        assert not set(mode) & set("wax+"), path
        return opened(path, mode, *args, **options)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a temporary file")

    monkeypatch.setattr(Path, "open", read_only)
    for name in ("mkdtemp", "mkstemp", "NamedTemporaryFile"):
        monkeypatch.setattr(tempfile, name, refuse)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    return [paint(tmp_path / f"{colour}.png", colour) for colour in COLOURS]


def test_evaluations_write_no_file(photos: list[str], tmp_path: Path, no_files: None) -> None:
    model, processor = StandIn(), StandInProcessor()
    before = sorted(tmp_path.iterdir())
    texts = mx.eye(12)[:3]  # the stand-in's first dimensions are the colours
    found = benchmarks.evaluate_imagenet(model, processor, photos, [0, 1, 1], texts, batch_size=2)
    assert (found["images"], found["top5"]) == (3, 100.0)
    assert found["top1"] == pytest.approx(200 / 3)
    captions = ["a red one", "a red one", "a green one", "a blue one"]  # equal ones count twice
    found = benchmarks.evaluate_retrieval(model, processor, photos, captions, [0, 0, 1, 2])
    assert (found["images"], found["captions"]) == (3, 4)
    assert found["image_to_text_r1"] == found["text_to_image_r1"] == 100.0
    assert model.texts_seen == 3
    assert sorted(tmp_path.iterdir()) == before


def test_one_unreadable_image_ends_the_evaluation(
    photos: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.png").write_bytes(b"")
    model, processor, texts = StandIn(), StandInProcessor(), mx.eye(12)[:3]
    paths, targets = [*photos, str(tmp_path / "bad.png")], [0, 1, 2, 0]
    with pytest.raises(DataError, match=r"1 of 4 images cannot be used, .* not be comparable"):
        benchmarks.evaluate_imagenet(model, processor, paths, targets, texts)
    assert capsys.readouterr().err.startswith(f"skipped {tmp_path}/bad.png: ")
    with pytest.raises(DataError, match="none of the 1 images"):
        benchmarks.evaluate_imagenet(model, processor, paths[3:], [0], texts)
    with pytest.raises(DataError, match="1 of 3 texts cannot be used"):
        captions = ["red", "green", "\udcff"]
        benchmarks.evaluate_retrieval(model, processor, photos, captions, [0, 1, 2])


def test_retrieval_without_a_text_tower_embeds_no_image(photos: list[str]) -> None:
    model = StandIn()
    model.text = None
    with pytest.raises(ModelError, match="image tower only"):
        benchmarks.evaluate_retrieval(model, StandInProcessor(), photos[:1], ["red"], [0])
    assert model.image_batches == []
