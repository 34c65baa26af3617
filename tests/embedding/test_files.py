"""Image files found for a directory, glob, list or single path."""

import os
import time
from pathlib import Path

import pytest
from standin import paint

from mlx_mobileclip.embedding.files import Ignored, find_images
from mlx_mobileclip.errors import DataError


def test_images_are_found_in_directories_globs_and_lists(photos: Path, tmp_path: Path) -> None:
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
        (str(empty), "contains no image"),
        (f"{empty}/*.png", "no file matches"),
        (str(tmp_path / "none"), "no such file"),
        (str(tmp_path / "binary.dat"), "line 1 contains a NUL"),
    ):
        with pytest.raises(DataError, match=match):
            find_images(source)


def names(source: Path, ignored: Ignored | None = None) -> list[str]:
    return [str(Path(p).relative_to(source)) for p in find_images(str(source), None, ignored)]


@pytest.mark.parametrize(
    "pattern",
    ["**/*.png", "**", "**/**/*.png", "*/**/*.png", "**/l/**/*.png", "**/*/**/*/**/*/**/*.png"],
)
def test_globs_match_each_file_once_despite_links(tmp_path: Path, pattern: str) -> None:
    """60 folders with a link to themselves and one to the folder above."""
    for i in range(60):
        folder = tmp_path / f"{i % 12}" / f"{i}"
        folder.mkdir(parents=True)
        (folder / "x.png").touch()
        (folder / "l").symlink_to(".")
        (folder / "up").symlink_to("..")
    (tmp_path / "l").symlink_to(".")
    started = time.perf_counter()
    found = find_images(f"{tmp_path}/{pattern}")
    assert time.perf_counter() - started < 2
    assert len(found) == len({os.path.realpath(path) for path in found}) == 60


@pytest.mark.parametrize("suffix", ["jfif", "JPE", "avif", "HEIC", "hif", "jxl", "png", "dib"])
def test_photo_suffixes_are_recognized(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"x.{suffix}").write_bytes(b"x")
    assert names(tmp_path) == [f"x.{suffix}"]


def test_linked_folders_are_searched_once_and_loops_end(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for name in ("root/z/a.png", "elsewhere/b.png", "elsewhere/deep/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        paint(tmp_path / name, "red")
    (root / "a").symlink_to("z")  # sorts before the real folder
    (root / "album").symlink_to(elsewhere)
    (root / "album2").symlink_to(elsewhere)
    (root / "deep").symlink_to(elsewhere / "deep")
    (root / "z" / "up").symlink_to(root)
    (elsewhere / "back").symlink_to(tmp_path)
    (root / "gone").symlink_to(tmp_path / "nowhere")
    (root / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (root / "self").symlink_to("self")
    ignored = Ignored()
    assert names(root, ignored) == ["gone.png", "z/a.png", "album/b.png", "album/deep/c.png"]
    assert ignored == {
        "broken links": 2,
        "linked folders that were searched already": 4,
        "folders that were searched already": 2,
    }
    found = find_images(f"{root}/**/*.png", ignored=ignored)
    assert sorted(Path(p).name for p in found) == ["a.png", "b.png", "c.png", "gone.png"]
    assert f"{root}/z/a.png" in found


def test_ignored_files_are_counted(photos: Path, tmp_path: Path) -> None:
    ignored = Ignored()
    assert str(ignored) == ""
    (photos / "sub" / "more.txt").touch()
    (photos / "README").touch()
    assert len(names(photos, ignored)) == 7
    assert ignored == {".txt": 2, "hidden": 1, "hidden folders": 1, "without a suffix": 1}
    assert str(ignored).startswith("ignored 5: 2 .txt, ")
    find_images(f"{photos}/*", ignored=ignored)
    assert ignored["folders that match a glob"] == 1
    (tmp_path / "raw").mkdir()
    for i in range(12):
        (tmp_path / "raw" / f"x.{i}").touch()
    with pytest.raises(DataError, match=r"no image \(ignored 12: .*, 4 others\)"):
        find_images(str(tmp_path / "raw"))


def test_single_image_needs_no_suffix(tmp_path: Path) -> None:
    for kind in ("png", "jpeg", "gif", "webp", "bmp", "tiff"):
        paint(tmp_path / f"x.{kind}", "red")
        bare = (tmp_path / f"x.{kind}").rename(tmp_path / kind)
        assert find_images(str(bare)) == [str(bare)]
    (tmp_path / "list").write_text("BMW/a.png\n")
    assert find_images(str(tmp_path / "list")) == ["BMW/a.png"]


def test_unreachable_folders_are_skipped(tmp_path: Path) -> None:
    """Folders nested too deeply for the operating system are skipped."""
    top = tmp_path / "top"
    top.mkdir()
    paint(top / "a.png", "red")
    before = Path.cwd()
    os.chdir(top)
    try:
        for _ in range(25):  # paths of more than 4096 bytes
            Path("d" * 200).mkdir()
            os.chdir("d" * 200)
    finally:
        os.chdir(before)
    skipped: list[str] = []
    found = find_images(str(top), lambda _, reason: skipped.append(reason))
    assert found == [str(top / "a.png")]
    assert skipped == ["cannot be read (File name too long)"]
    ignored = Ignored()
    assert find_images(f"{top}/**/*.png", ignored=ignored) == found
    assert ignored == {"folders that cannot be read": 1}


def test_too_long_name_is_refused() -> None:
    for name in ("x" * 300, "x/" * 3000):
        with pytest.raises(DataError, match="no such file or directory, or no permission"):
            find_images(name)


def test_empty_name_is_refused() -> None:
    with pytest.raises(DataError, match="the name is empty"):
        find_images("")
