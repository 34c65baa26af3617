"""Which files a source stands for."""

from pathlib import Path

import pytest
from standin import paint

from mlx_mobileclip.embedding.files import find_images
from mlx_mobileclip.errors import DataError


def test_find_images(photos: Path, tmp_path: Path) -> None:
    found = [str(Path(p).relative_to(photos)) for p in find_images(str(photos))]
    assert found == [
        "a.JPG",
        "b.png",
        "broken.jpg",
        "live.heic",
        "z.png",
        "sub/c.png",
        "sub/deep/d.webp",
    ]
    assert find_images(f"{photos}/**/*.png") == sorted(
        str(photos / name) for name in ("b.png", "z.png", "sub/c.png")
    )
    assert find_images(str(photos / "b.png")) == [str(photos / "b.png")]
    listing = tmp_path / "list.txt"
    listing.write_bytes(b"\xef\xbb\xbfz.png\r\n\nb.png\n\xff.png\n")
    assert find_images(str(listing)) == ["z.png", "b.png", "\udcff.png"]
    odd = tmp_path / "[odd]*"
    odd.mkdir()
    paint(odd / "x.png", "red")
    assert find_images(str(odd)) == [str(odd / "x.png")]
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "binary.dat").write_bytes(b"\0\1\2")
    for source, match in (
        (str(empty), "holds no image"),
        (f"{empty}/*.png", "no file matches"),
        (str(tmp_path / "none"), "no such file"),
        (str(tmp_path / "binary.dat"), "no list of images"),
    ):
        with pytest.raises(DataError, match=match):
            find_images(source)
