"""Readers of the data sets."""

from pathlib import Path

import pytest

from mlx_mobileclip.eval import datasets


def test_numbered_classes_are_in_the_order_of_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "imagenet_classes", lambda: ("class",) * 12)
    for i in range(12):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "x.png").touch()
    paths, targets = datasets.imagenet_images(tmp_path)
    assert [int(Path(path).parent.name) for path in paths] == targets == list(range(12))
