"""Lines of label, text and list files: encodings, line ends, errors that name the line."""

import os
from pathlib import Path

import pytest
from standin import paint

from mlx_mobileclip.embedding.files import find_images
from mlx_mobileclip.embedding.lines import read_lines
from mlx_mobileclip.errors import DataError

LINES = ["café", "grünes Haus", "", "\U0001f600 a\u2028b"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_encodings_and_line_ends(tmp_path: Path, encoding: str, end: str) -> None:
    mark = "\ufeff" if encoding.startswith("utf-16-") else ""
    path = tmp_path / "labels.txt"
    for last in ("", end):
        path.write_bytes((mark + end.join(LINES) + last).encode(encoding))
        assert read_lines(path) == read_lines(str(path), paths=True) == LINES


def test_mixed_line_ends_and_empty_files(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    for data, lines in (
        (b"a\r\nb\rc\nd", ["a", "b", "c", "d"]),
        (b"", []),
        (b"\xef\xbb\xbf", []),
        (b"\n", [""]),
        (b"\xef\xbb\xbfa\n\xef\xbb\xbfb\n", ["a", "b"]),  # two files joined
    ):
        path.write_bytes(data)
        assert read_lines(path) == lines


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ("red\ngreen\rcafé\n".encode("latin-1"), r"labels.txt: line 3 is not UTF-8 \(byte 0xE9\)"),
        ("\ufeffred\n\ud83d\nx".encode("utf-16-le", "surrogatepass"), "line 2 is not UTF-16"),
        (b"\xff\xfer\0\n\0x", "line 2 is not UTF-16"),
        ("red\nblue".encode("utf-16-le"), "line 1 contains a NUL"),
        ("red\nblue".encode("utf-16-be"), "line 1 contains a NUL"),
        ("red\n".encode("utf-32"), "line 1 is UTF-32"),
        (b"red\nblue\0\n", "line 2 contains a NUL"),
        (b"red\n\xed\xa0\x80\n", "line 2 is not UTF-8"),  # a surrogate
    ],
)
def test_undecodable_files_are_refused(tmp_path: Path, data: bytes, match: str) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes(data)
    with pytest.raises(DataError, match=match):
        read_lines(path)


def test_lists_of_paths_can_name_any_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode("café.png".encode("latin-1"))
    paint(name, "red")
    Path("list.txt").write_bytes(b"caf\xe9.png\n")
    assert find_images("list.txt") == [name]
    assert Path(name).is_file()
    Path("list.txt").write_bytes("\ufeffé.png\r\nb.png".encode("utf-16-le"))
    assert find_images("list.txt") == ["é.png", "b.png"]
    Path("list.txt").write_bytes("é.png\nb.png".encode("utf-16-le"))
    with pytest.raises(DataError, match="line 1 contains a NUL"):
        find_images("list.txt")


def test_unreadable_paths_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", "a\0b"):
        with pytest.raises(DataError, match="cannot be read"):
            read_lines(path)
