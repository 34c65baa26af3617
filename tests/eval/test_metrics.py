"""Metrics against definitions written with plain loops."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_mobileclip.errors import DataError
from mlx_mobileclip.eval import metrics


def unit(rng: np.random.Generator, rows: int, width: int = 6) -> np.ndarray:
    values = rng.normal(size=(rows, width)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def first_k(scores: np.ndarray, k: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]


@pytest.mark.parametrize("rows_at_once", [1, 7, 512])
def test_recall_equals_the_definition(rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "ROWS_AT_ONCE", rows_at_once)
    rng = np.random.default_rng(1)
    owner = np.concatenate([np.arange(20), rng.integers(0, 20, 45)])
    rng.shuffle(owner)
    images = unit(rng, 20)
    texts = images[owner] + 0.6 * unit(rng, 65)
    scores = images @ texts.T
    found = metrics.recall(mx.array(images), texts, owner)
    for k in (1, 5, 10):
        to_text = [any(owner[t] == i for t in first_k(scores[i], k)) for i in range(20)]
        to_image = [owner[t] in first_k(scores[:, t], k) for t in range(65)]
        assert found.image_to_text[k] == pytest.approx(np.mean(to_text))
        assert found.text_to_image[k] == pytest.approx(np.mean(to_image))
    assert 0.1 < found.image_to_text[1] < 1


def test_recall_of_known_cases() -> None:
    eye = np.eye(4, dtype=np.float32)
    perfect = metrics.recall(eye, np.repeat(eye, 5, axis=0), np.repeat(np.arange(4), 5))
    assert perfect.image_to_text == perfect.text_to_image == {1: 1.0, 5: 1.0, 10: 1.0}
    wrong = metrics.recall(eye, eye[[1, 0, 3, 2]], [0, 1, 2, 3], at=(1, 4))
    assert wrong.image_to_text == {1: 0.0, 4: 1.0}
    # A collapsed model scores at chance level.
    same = np.ones((100, 3), np.float32)
    collapsed = metrics.recall(same, same, np.arange(100))
    assert collapsed.image_to_text == {1: 0.01, 5: 0.05, 10: 0.1}


def test_top_k_accuracy_equals_the_definition() -> None:
    rng = np.random.default_rng(2)
    images, texts = unit(rng, 200), unit(rng, 11)
    targets = rng.integers(0, 11, 200)
    scores = images @ texts.T
    accuracy = metrics.top_k_accuracy(images, mx.array(texts), targets)
    for k in (1, 5):
        hits = [targets[i] in first_k(scores[i], k) for i in range(200)]
        assert accuracy[k] == pytest.approx(np.mean(hits))
    half = mx.array(images).astype(mx.bfloat16)
    assert metrics.top_k_accuracy(half, texts, targets)[5] == pytest.approx(accuracy[5], abs=0.05)


@pytest.mark.parametrize(
    ("images", "texts", "owner", "match"),
    [
        (np.eye(3), np.eye(3), [0, 1], "image_of_text has shape"),
        (np.eye(3), np.eye(3), [0, 1, 1], "every image"),
        (np.eye(3), np.eye(3), [0, 1, 3], "every image"),
        (np.eye(3), np.eye(3)[:, :2], [0, 1, 2], "3 and 2 dimensions"),
        (np.eye(3) * np.nan, np.eye(3), [0, 1, 2], "not finite"),
        (np.zeros((0, 3)), np.eye(3), [0, 1, 2], "one row per item"),
        (np.zeros(3), np.eye(3), [0, 1, 2], "one row per item"),
    ],
)
def test_wrong_arguments_are_refused(
    images: np.ndarray, texts: np.ndarray, owner: list[int], match: str
) -> None:
    with pytest.raises(DataError, match=match):
        metrics.recall(images, texts, owner)


def test_targets_are_checked() -> None:
    with pytest.raises(DataError, match="between 0 and 2"):
        metrics.top_k_accuracy(np.eye(3), np.eye(3), [0, 1, 3])
    with pytest.raises(DataError, match="targets has shape"):
        metrics.top_k_accuracy(np.eye(3), np.eye(3), [0])
