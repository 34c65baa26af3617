"""Files that others put in place of an output are neither written through nor replaced."""

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from standin import COLOURS, StandIn, StandInProcessor, paint

from mlx_mobileclip.embedding import resume_log, writers
from mlx_mobileclip.embedding.embed_to_file import embed_images, embed_texts
from mlx_mobileclip.embedding.lines import MAX_BYTES, read_lines
from mlx_mobileclip.embedding.readers import read_embeddings
from mlx_mobileclip.embedding.resume_log import MAGIC, RECORD, ResumeLog
from mlx_mobileclip.errors import DataError

SUFFIXES = (".safetensors", ".npz", ".parquet")


def run(paths: list[str], output: Path, model: StandIn | None = None, **options: Any) -> Any:
    model = model or StandIn()
    return embed_images(model, StandInProcessor(), paths, output, **options)


def paint_many(tmp_path: Path, count: int = 6) -> list[str]:
    return [paint(tmp_path / f"{i:03}.png", COLOURS[i % 3], seed=i) for i in range(count)]


class Interrupted(StandIn):
    """Embeds one batch, then is interrupted."""

    def encode_image(self, pixels: mx.array, normalize: bool = True) -> mx.array:
        if self.image_batches:
            raise KeyboardInterrupt
        return super().encode_image(pixels, normalize)


def interrupt(paths: list[str], output: Path) -> Path:
    with pytest.raises(KeyboardInterrupt):
        run(paths, output, Interrupted(), batch_size=2)
    return output.with_name(f"{output.name}.partial")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_other_files_beside_the_output_are_kept(tmp_path: Path, suffix: str) -> None:
    output, precious = tmp_path / f"x{suffix}", tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / f".x{suffix}.tmp").write_text("precious")
    (tmp_path / f".x{suffix}.{'0' * 16}.tmp").symlink_to(precious)
    abandoned = tmp_path / f".x{suffix}.{'1' * 16}.tmp"
    abandoned.write_text("of a run that was killed")
    run(paint_many(tmp_path), output)
    assert precious.read_text() == (tmp_path / f".x{suffix}.tmp").read_text() == "precious"
    assert (tmp_path / f".x{suffix}.{'0' * 16}.tmp").is_symlink() and not abandoned.exists()
    assert len(read_embeddings(output).keys) == 6


APPEARS: dict[str, Callable[[Path], object]] = {
    "a file": lambda output: output.write_text("precious"),
    "a link": lambda output: output.symlink_to("precious"),
    "a link to nothing": lambda output: output.symlink_to("nowhere"),
    "a directory": lambda output: output.mkdir(),
}


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", APPEARS)
def test_files_created_meanwhile_are_kept(
    name: str, suffix: str, links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds without hard links, too; finished rows are kept."""
    output, precious = tmp_path / f"x{suffix}", tmp_path / "precious"
    precious.write_text("precious")
    paths = paint_many(tmp_path)

    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    class Late(StandIn):
        def encode_image(self, pixels: mx.array, normalize: bool = True) -> mx.array:
            if not self.image_batches:
                APPEARS[name](output)
            return super().encode_image(pixels, normalize)

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(DataError, match="was created meanwhile and is not overwritten"):
        run(paths, output, Late(), batch_size=2)
    assert precious.read_text() == "precious"
    assert output.is_symlink() or output.is_dir() or output.read_text() == "precious"
    assert not [*tmp_path.glob(".*")] and not (tmp_path / "nowhere").exists()
    output.rmdir() if output.is_dir() and not output.is_symlink() else output.unlink()
    assert run(paths, output).resumed == 6


@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("name", ["a link to nothing", "a directory"])
def test_outputs_that_are_not_files_are_refused_at_once(
    name: str, update: bool, tmp_path: Path
) -> None:
    APPEARS[name](tmp_path / "x.npz")
    model = StandIn()
    with pytest.raises(DataError, match=r"already exists|is not a file"):
        run(paint_many(tmp_path), tmp_path / "x.npz", model, update=update)
    assert not model.image_batches and not (tmp_path / "nowhere").exists()


def test_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.npz")
    with pytest.raises(DataError, match="is not a file"):
        run(paint_many(tmp_path), tmp_path / "x.npz", update=True)


def test_compressed_npz_is_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", embeddings=np.zeros((1 << 20, 64), np.float32))
    with pytest.raises(DataError, match="it is compressed"):
        read_embeddings(tmp_path / "x.npz")


# Resume logs.


def test_log_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, output = paint_many(tmp_path), tmp_path / "x.npz"
    log = interrupt(paths, output)
    data = log.read_bytes()
    (tmp_path / "second name").hardlink_to(log)
    with pytest.raises(DataError, match="must be a regular file that you own"):
        run(paths, output)
    (tmp_path / "second name").unlink()
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    with pytest.raises(DataError, match="must be a regular file that you own"):
        run(paths, output)
    monkeypatch.undo()
    assert log.read_bytes() == data and run(paths, output).resumed == 2


def test_only_the_own_log_is_removed(tmp_path: Path) -> None:
    with ResumeLog(tmp_path / "x.npz", {}) as log:
        log.path.rename(tmp_path / "moved")
        log.path.write_text("precious")
    assert log.path.read_text() == "precious"


def test_other_inputs_do_not_discard_a_log(tmp_path: Path) -> None:
    paths, output = paint_many(tmp_path), tmp_path / "x.npz"
    others = [paint(tmp_path / "other.png", "red")]
    log = interrupt(paths, output)
    with pytest.raises(DataError, match="2 images of an unfinished run with other inputs"):
        run(others, output)
    assert log.exists() and not output.exists()
    assert run([*paths, *others], output).resumed == 2
    log = interrupt(paths, tmp_path / "y.npz")
    for path in paths:
        Path(path).unlink()  # the rows of removed images are of no use
    assert run(others, tmp_path / "y.npz").embedded == 1 and not log.exists()


def test_other_kinds_do_not_discard_a_log(tmp_path: Path) -> None:
    log = interrupt(paint_many(tmp_path), tmp_path / "x.npz")
    data = log.read_bytes()
    with pytest.raises(DataError, match="unfinished run with other weights, settings or version"):
        embed_texts(StandIn(), StandInProcessor(), ["red"], tmp_path / "x.npz")
    assert log.read_bytes() == data


def test_full_disk_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is reported even if closing the file writes the same bytes again."""
    paths, output = paint_many(tmp_path), tmp_path / "x.npz"
    monkeypatch.setattr(resume_log.os, "fdopen", lambda fd, mode: Full(open(fd, mode)))  # noqa: PTH123, SIM115
    with pytest.raises(DataError, match=r"No space left.*free some space and run the same"):
        run(paths, output, batch_size=2)
    monkeypatch.undo()
    assert run(paths, output).resumed == 2


class Full:
    """A file on a disk with room for its header and one batch."""

    def __init__(self, file: Any) -> None:
        self.file, self.records = file, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: bytes) -> None:
        self.records += 1
        self.file.write(data if self.records <= 2 else b"")

    def flush(self) -> None:
        self.file.flush()
        if self.records > 2:
            raise OSError(28, "No space left on device")

    def close(self) -> None:
        self.file.close()
        self.flush_failed()

    def flush_failed(self) -> None:
        if self.records > 2:
            raise OSError(28, "No space left on device")


def record(keys: Any, rows: bytes, lengths: tuple[int, int] | None = None) -> bytes:
    text = keys if isinstance(keys, bytes) else json.dumps(keys).encode()
    checksum = zlib.crc32(rows, zlib.crc32(text))
    return RECORD.pack(MAGIC, *(lengths or (len(text), len(rows))), checksum) + text + rows


ROW = np.ones(4, "<f4").tobytes()
CRAFTED = {
    "no keys": record([], b""),
    "a number": record(7, ROW),
    "no pairs": record(["a"], ROW),
    "triples": record([["a", "b", "c"]], ROW),
    "no JSON": record(b"{", ROW),
    "no UTF-8": record(b"\xff", ROW),
    "nested": record(b"[" * 100_000, ROW),
    "half a value": record([["a", "b"]], b"123"),
    "uneven": record([["a", ""], ["b", ""], ["c", ""]], ROW),
    "not finite": record([["a", "b"]], np.full(4, np.nan, "<f4").tobytes()),
    "two widths": record([["a", ""]], ROW) + record([["b", ""]], ROW * 2),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_logs_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.npz.partial"
    data = record({"kind": "images"}, b"") + CRAFTED[name]
    path.write_bytes(data)
    with pytest.raises(DataError, match="remove the file, or choose another --output"):
        ResumeLog(tmp_path / "x.npz", {"kind": "images"}).__enter__()
    assert path.read_bytes() == data


def test_log_of_another_width_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz.partial"
    path.write_bytes(record({}, b"") + record([["a", ""]], ROW))
    with ResumeLog(tmp_path / "x.npz", {}) as log, pytest.raises(DataError, match="another model"):
        log.append([("b", "")], np.ones((1, 5), np.float32))


def test_lengths_in_a_log_are_bounded(tmp_path: Path) -> None:
    """A sparse log whose header claims 8 GB is not read."""
    path = tmp_path / "x.npz.partial"
    start = record({}, b"")
    path.write_bytes(start + record([], b"", ((1 << 32) - 1, (1 << 32) - 1)))
    os.truncate(path, 9 << 30)
    with ResumeLog(tmp_path / "x.npz", {}) as log:
        assert log.rows == {} and path.stat().st_size == len(start)


# Lists.


def test_size_of_lists_is_bounded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 1 contains a NUL"):
        read_lines("/dev/zero")
    large = tmp_path / "movie.mkv"
    large.write_bytes(b"\x1a\x45\xdf\xa3\0")
    os.truncate(large, 100 << 30)
    with pytest.raises(DataError, match="line 1 "):
        read_lines(large)
    large.write_bytes(b"x" * (MAX_BYTES + 1))
    with pytest.raises(DataError, match="larger than 256 MB; split it"):
        read_lines(large)


def test_writers_leave_nothing_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be written"):
        writers.write_embeddings(tmp_path / "no" / "x.npz", ["a"], [np.ones(2, np.float32)], {})
    assert not [*tmp_path.iterdir()]
