"""A directory of photos for the tests of embedding."""

from pathlib import Path

import pytest
from standin import COLOURS, paint


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Seven images in three directories, one damaged and one HEIC, and files to be ignored."""
    root = tmp_path / "photos"
    for i, name in enumerate(("b.png", "a.JPG", "sub/c.png", "sub/deep/d.webp", "z.png")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        paint(root / name, COLOURS[i % 3], seed=i)
    (root / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a photo")
    (root / "live.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (root / "notes.txt").write_text("no image")
    (root / ".hidden.png").write_bytes((root / "b.png").read_bytes())
    (root / ".git").mkdir()
    (root / ".git" / "x.png").write_bytes(b"")
    return root
