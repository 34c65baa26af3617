"""Indexing: embedded, reused, unchanged, kept and dropped files."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mlx_mobileclip
from mlx_mobileclip import DataError, Library
from mlx_mobileclip.library import watch

ROOT = Path(__file__).parents[2]


def index(library: Library, *paths: Path, **options: object) -> tuple[int, int, int, int, int]:
    summary = library.index(paths, model="demo", **options)  # type: ignore[arg-type]
    return summary.embedded, summary.reused, summary.unchanged, summary.dropped, summary.kept


def paths_of(library: Library) -> set[str]:
    return {Path(path).name for path in library.search(k=100).paths}


def test_only_changed_files_are_embedded(library: Library, few: Path) -> None:
    assert index(library, few) == (5, 0, 0, 0, 0)
    assert index(library, few) == (0, 0, 5, 0, 0)
    Image.new("RGB", (30, 20), "red").save(few / "s0.png")
    assert index(library, few) == (1, 0, 4, 0, 0)
    assert index(library) == (0, 0, 5, 0, 0)  # all indexed folders
    assert not library.verify(files=True)


def test_vectors_match_the_model(library: Library, few: Path) -> None:
    index(library, few)
    model, processor = mlx_mobileclip.load("demo")
    for path in sorted(few.iterdir()):
        row = np.asarray(model.encode_image(processor.images([path]), normalize=True))[0]
        [match] = library.search(like=path, k=1)
        assert match.path == str(path)
        assert match.score == pytest.approx(float(row @ row), abs=2e-3)


def test_moved_and_copied_files_reuse_their_vectors(library: Library, few: Path) -> None:
    index(library, few)
    (few / "s1.png").rename(few / "moved.png")
    shutil.copy(few / "s2.png", few / "copy.png")
    assert index(library, few) == (0, 2, 4, 0, 0)
    assert paths_of(library) == {"s0.png", "moved.png", "s2.png", "copy.png", "s3.png", "s4.png"}
    assert not library.verify(files=True)


def test_few_missing_files_are_dropped_and_many_are_kept(library: Library, few: Path) -> None:
    index(library, few)
    (few / "s0.png").unlink()
    assert index(library, few) == (0, 0, 4, 1, 0)
    for name in ("s1.png", "s2.png"):
        (few / name).unlink()
    assert index(library, few) == (0, 0, 2, 0, 2)
    assert len(paths_of(library)) == 4
    assert index(library, few, drop_missing=True) == (0, 0, 2, 2, 0)
    few.rename(few.with_name("unmounted"))
    assert index(library, few) == (0, 0, 0, 0, 2)
    assert not library.verify()


def test_freed_slots_are_reused(library: Library, few: Path) -> None:
    index(library, few)
    (few / "s0.png").unlink()
    index(library, few)
    Image.new("RGB", (30, 20), "red").save(few / "new.png")
    index(library, few)
    assert not library.verify(files=True)
    [[slots]] = sqlite3.connect(library.path).execute("SELECT max(slot) FROM file")
    assert slots == 4


def test_unreadable_files_are_recorded_and_skipped(library: Library, few: Path) -> None:
    png = (few / "s0.png").read_bytes()
    (few / "cut.png").write_bytes(png[: len(png) // 2])
    (few / "text.jpg").write_text("no image")
    (few / "empty.png").touch()
    (few / "link.png").symlink_to("nowhere")
    (few / "folder.png").mkdir()
    os.mkfifo(few / "pipe.png")
    summary = library.index(few, model="demo")
    assert summary.embedded == 5
    names = {Path(path).name for path in summary.errors}
    assert names == {"cut.png", "text.jpg", "empty.png", "link.png", "pipe.png"}
    report = library.status()
    assert report["errors"] == 5 and all(entry["reason"] for entry in report["failed"])
    assert not library.index(few, model="demo").errors  # unchanged, so not retried
    assert len(library.index(few, model="demo", retry=True).errors) == 5
    (few / "cut.png").write_bytes(png)
    assert index(library, few) == (0, 1, 9, 0, 0)


def test_non_utf8_and_odd_names(library: Library, few: Path) -> None:
    names = [b"\xff\xfe.png", "ä\u202e.png".encode(), b"a\nb.png", b"~x.png", b"-0 '\".png"]
    for name in names:
        shutil.copy(few / "s0.png", os.fsencode(few) + b"/" + name)
    index(library, few)
    found = {os.fsencode(path) for path in library.search(k=100).paths}
    assert found >= {os.fsencode(few) + b"/" + name for name in names}
    assert not library.verify(files=True)


def test_nested_folders(library: Library, few: Path) -> None:
    inner = few / "inner"
    inner.mkdir()
    shutil.copy(few / "s0.png", inner / "x.png")
    index(library, inner)
    assert index(library, few) == (4, 1, 1, 0, 0)  # x.png is unchanged, s0.png is its copy
    assert index(library, inner) == (0, 0, 1, 0, 0)
    assert [entry["path"] for entry in library.status()["folders"]] == [str(few)]
    assert library.search(folder=inner).paths == [str(inner / "x.png")]
    assert len(library.search(folder=few)) == 6


def test_exclude_globs(library: Library, few: Path) -> None:
    (few / "old").mkdir()
    shutil.copy(few / "s0.png", few / "old" / "x.png")
    assert index(library, few, exclude=["old", "s[12].png"])[0] == 3
    assert paths_of(library) == {"s0.png", "s3.png", "s4.png"}


def test_other_model_is_an_error(library: Library, few: Path) -> None:
    index(library, few)
    with pytest.raises(DataError, match=r"was made with demo.*--rebuild"):
        library.index(few, model="demo", dtype="float16")
    again = library.index(few, model="demo", dtype="float16", rebuild=True)
    assert again.embedded == 5
    assert library.index(few).unchanged == 5  # the recorded model and dtype
    assert not library.verify()


def test_index_is_readable_by_owner_only(library: Library, few: Path) -> None:
    index(library, few)
    files = list(library.path.parent.iterdir())
    assert files and {file.stat().st_mode & 0o777 for file in files} == {0o600}


def test_killed_runs_resume(tmp_path: Path, drawn: Path) -> None:
    """A killed run leaves whole batches, and the next run resumes."""
    database = tmp_path / "killed.db"
    command = [sys.executable, "-m", "mlx_mobileclip", "index", "--model", "demo", "--quiet"]
    command += ["--index", str(database), "--batch-size", "1", str(drawn)]
    started = subprocess.Popen(command, cwd=ROOT)
    count, deadline = 0, time.monotonic() + 60
    while count < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
        if database.exists() and database.stat().st_size:
            try:
                with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
                    [[count]] = connection.execute("SELECT count(slot) FROM file")
            except sqlite3.Error:
                count = 0
    started.send_signal(signal.SIGKILL)
    started.wait()
    with Library(database) as library:
        assert not library.verify()
        before = library.status()["photos"]
        assert before >= 3
        summary = library.index(drawn, model="demo")
        assert summary.unchanged == before and summary.embedded == 40 - before
        assert not library.verify(files=True)


def test_watch_by_polling(
    library: Library, few: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    index(library, few)
    monkeypatch.setattr(watch, "find_spec", lambda _: None)
    monkeypatch.setattr(watch, "POLL_S", 0.01)
    for _, _ in zip(range(2), watch.changes(library, quiet=False), strict=False):
        shutil.copy(few / "s0.png", few / "new.png")
        index(library)
    assert "photos]" in capsys.readouterr().err
    assert "new.png" in paths_of(library)


def test_watch_by_events(library: Library, few: Path) -> None:
    pytest.importorskip("watchfiles", reason="pip install watchfiles, the extra photos")
    index(library, few)
    changes = watch.changes(library)
    timer = threading.Timer(0.5, lambda: shutil.copy(few / "s0.png", few / "new.png"))
    timer.start()
    next(changes)
    assert index(library) == (0, 1, 5, 0, 0)
