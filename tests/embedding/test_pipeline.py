"""Tests of iter_embeddings: order, batch sizes, errors as results, and thread shutdown."""

import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from standin import COLOURS, WIDTH, StandIn, StandInProcessor, paint

from mlx_mobileclip.embedding.embed_to_file import embed_images, embed_texts
from mlx_mobileclip.embedding.pipeline import iter_embeddings, iter_text_embeddings
from mlx_mobileclip.errors import DataError, ImageError, ModelError


class Recording(StandInProcessor):
    """Records which images are decoded; an image with a gate waits for it."""

    def __init__(self, gates: dict[str, threading.Event] | None = None) -> None:
        super().__init__()
        self.gates = gates or {}
        self.started: list[str] = []

    def pixels(self, source: Any) -> Any:
        self.started.append(source)
        if gate := self.gates.get(source):
            assert gate.wait(10)
        return super().pixels(source)


def paint_many(directory: Path, count: int) -> list[str]:
    return [paint(directory / f"{i:03}.png", COLOURS[i % 3], seed=i) for i in range(count)]


@pytest.fixture
def no_new_threads() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def test_order_and_batches(tmp_path: Path, no_new_threads: None) -> None:
    paths, model = paint_many(tmp_path, 7), StandIn()
    results = list(iter_embeddings(model, StandInProcessor(), paths, batch_size=3))
    assert [item.name for item in results] == paths
    assert all(item.error is None for item in results)
    assert model.image_batches == [3, 3, 1]
    for item in results:
        assert item.row is not None
        assert item.row.shape == (WIDTH,) and item.row.dtype == np.float32
    expected = StandIn().encode_image(StandInProcessor().images(paths))
    np.testing.assert_allclose([item.row for item in results], np.array(expected), atol=1e-6)


def test_order_does_not_depend_on_the_threads(tmp_path: Path) -> None:
    paths = paint_many(tmp_path, 4)
    processor = Recording({paths[0]: threading.Event()})
    results = iter_embeddings(StandIn(), processor, paths, batch_size=1, workers=2)
    timer = threading.Timer(0.2, processor.gates[paths[0]].set)  # the first is decoded last
    timer.start()
    assert [item.name for item in results] == paths
    timer.join()


def test_errors_are_returned_in_order(tmp_path: Path) -> None:
    class Overflowing(StandIn):
        def encode_image(self, pixels: mx.array, normalize: bool = True) -> mx.array:
            rows = super().encode_image(pixels, normalize)
            blue = pixels.mean(axis=(1, 2))[:, 2:] > 0.5
            return mx.where(blue, float("nan"), rows)

    class Odd(StandInProcessor):
        def pixels(self, source: Any) -> Any:
            if source.endswith("odd.png"):
                raise MemoryError("no\nmemory")
            return super().pixels(source)

    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    red, blue = paint(tmp_path / "red.png", "red"), paint(tmp_path / "blue.png", "blue")
    paths = [str(tmp_path / "gone.png"), red, str(tmp_path / "broken.png"), blue, "odd.png"]
    model = Overflowing()
    results = list(iter_embeddings(model, Odd(), paths, batch_size=5))
    assert [item.name for item in results] == paths
    assert [item.row is not None for item in results] == [False, True, False, False, False]
    gone, _, broken, infinite, odd = (item.error for item in results)
    assert isinstance(gone, ImageError) and "no such file" in str(gone)
    assert isinstance(broken, ImageError) and "broken.png" in str(broken)
    assert isinstance(infinite, DataError) and "not finite" in str(infinite)
    assert isinstance(odd, DataError) and str(odd) == "MemoryError: no memory"
    assert model.image_batches == [2]
    # A batch without any usable image does not reach the model.
    assert [item.row for item in iter_embeddings(model, Odd(), paths[:1])] == [None]
    assert model.image_batches == [2]


def test_early_close_stops_the_threads(tmp_path: Path, no_new_threads: None) -> None:
    paths, processor = paint_many(tmp_path, 40), Recording()
    with closing(iter_embeddings(StandIn(), processor, iter(paths), batch_size=2)) as results:
        assert next(results).name == paths[0]
    # Two batches are prepared ahead of the one that was read.
    assert len(processor.started) <= 3 * 2
    assert list(results) == []


def test_ctrl_c_in_the_model_stops_the_threads(tmp_path: Path, no_new_threads: None) -> None:
    class Interrupted(StandIn):
        def encode_image(self, pixels: mx.array, normalize: bool = True) -> mx.array:
            raise KeyboardInterrupt

    processor = Recording()
    with pytest.raises(KeyboardInterrupt):
        next(iter_embeddings(Interrupted(), processor, paint_many(tmp_path, 40), batch_size=2))
    assert len(processor.started) <= 3 * 2


def test_texts_are_embedded_in_order() -> None:
    texts = ["a red bus", "\udcff", "", "a red bus"]
    results = list(iter_text_embeddings(StandIn(), StandInProcessor(), texts, batch_size=3))
    assert [item.name for item in results] == texts
    assert [str(item.error) for item in results if item.error] == ["is not UTF-8"]
    expected = StandIn().encode_text(StandInProcessor().texts(["a red bus", "", "a red bus"]))
    rows = [item.row for item in results if item.row is not None]
    np.testing.assert_allclose(rows, np.array(expected), atol=1e-6)


def test_options_are_checked_at_the_call() -> None:
    model = StandIn()
    for iterate in (iter_embeddings, iter_text_embeddings):
        with pytest.raises(DataError, match="at least 1"):
            iterate(model, StandInProcessor(), [], batch_size=0)
    model.text = None
    with pytest.raises(ModelError, match="image tower only"):
        iter_text_embeddings(model, StandInProcessor(), ["red"])


@pytest.mark.parametrize("names", ["ab.png", b"ab", 3, None])
def test_single_name_is_refused(names: Any, tmp_path: Path) -> None:
    for iterate in (iter_embeddings, iter_text_embeddings):
        with pytest.raises(DataError, match="takes a list, not a"):
            iterate(StandIn(), StandInProcessor(), names)
    for embed in (embed_images, embed_texts):
        with pytest.raises(DataError, match="takes a list, not a"):
            embed(StandIn(), StandInProcessor(), names, tmp_path / "x.npz")
