"""A small library of drawn scenes of the demo model's domain, indexed once."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from library_scenes import SCENES
from world import render

from mlx_mobileclip import Library


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty scenes, s00.png to s39.png."""
    root = tmp_path_factory.mktemp("drawn")
    for i, each in enumerate(SCENES):
        render(each).resize((128, 128)).save(root / f"s{i:02}.png")
    return root


@pytest.fixture(scope="session")
def indexed(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The index of these scenes; read-only."""
    path = tmp_path_factory.mktemp("index") / "photos.db"
    with Library(path) as library:
        summary = library.index(drawn, model="demo")
    assert (summary.embedded, summary.errors) == (len(SCENES), {})
    return path


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """Folder of five scenes."""
    root = tmp_path / "few"
    root.mkdir()
    for i, each in enumerate(SCENES[:5]):
        render(each).resize((64, 64)).save(root / f"s{i}.png")
    return root


@pytest.fixture
def library(tmp_path: Path) -> Iterator[Library]:
    """A library whose index does not exist yet."""
    with Library(tmp_path / "index" / "photos.db") as opened:
        yield opened


@pytest.fixture
def copied(indexed: Path, tmp_path: Path) -> Path:
    """Writable copy of the index."""
    path = tmp_path / "copy.db"
    with sqlite3.connect(indexed) as source, sqlite3.connect(path) as target:
        source.backup(target)
    return path
