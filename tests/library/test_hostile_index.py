"""Foreign, damaged, read-only, full and locked indexes: one-line errors, no data loss."""

import os
import shutil
import sqlite3
from pathlib import Path

import pytest

from mlx_mobileclip import DataError, Library
from mlx_mobileclip.library import schema
from mlx_mobileclip.library.schema import on_network


def assert_rejected(path: Path, match: str) -> None:
    with pytest.raises(DataError, match=match) as caught, Library(path) as library:
        library.search("a red circle")
    assert "\n" not in str(caught.value)


def test_foreign_files_are_rejected(tmp_path: Path) -> None:
    assert_rejected(tmp_path / "none.db", "no index")
    (tmp_path / "text.db").write_text("some text " * 2000)
    assert_rejected(tmp_path / "text.db", "not an index")
    with sqlite3.connect(tmp_path / "foreign.db") as foreign:
        foreign.execute("CREATE TABLE file(id)")
    assert_rejected(tmp_path / "foreign.db", "another program")
    os.mkfifo(tmp_path / "pipe.db")
    assert_rejected(tmp_path / "pipe.db", "not a file")
    assert_rejected(tmp_path, "not a file")
    assert (tmp_path / "text.db").read_text() == "some text " * 2000


def execute(path: Path, *statements: str) -> Path:
    with sqlite3.connect(path) as connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()
    return path


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("PRAGMA user_version=99", "newer version"),
        ("DROP TABLE vector", "tables"),
        ("CREATE TRIGGER t AFTER INSERT ON text BEGIN DELETE FROM file; END", "tables"),
        ("CREATE VIEW v AS SELECT 1", "tables"),
        ("UPDATE vector SET rows=zeroblob(100)", "damaged"),
        ("UPDATE vector SET chunk=7", "damaged"),
        ("UPDATE meta SET value=10000000 WHERE key='dim'", "rebuild"),
        ("UPDATE meta SET value='128' WHERE key='dim'", "setting dim is damaged"),
        ("UPDATE meta SET value=NULL WHERE key='dim'", "setting dim is damaged"),
        ("UPDATE meta SET value=1.5 WHERE key='dim'", "setting dim is damaged"),
        ("UPDATE meta SET value=x'00' WHERE key='text_identity'", "text_identity is damaged"),
        ("UPDATE meta SET value=7 WHERE key='text_identity'", "text_identity is damaged"),
    ],
)
def test_altered_indexes_are_rejected(copied: Path, statement: str, message: str) -> None:
    assert_rejected(execute(copied, statement), message)


def test_truncated_indexes_are_detected(copied: Path, indexed: Path) -> None:
    whole = indexed.read_bytes()
    for fraction in (0.1, 0.5, 0.9):
        copied.write_bytes(whole[: int(len(whole) * fraction)])
        with Library(copied) as library:
            try:
                problems = library.verify()
            except DataError as error:
                assert "\n" not in str(error)
            else:
                assert problems


def test_lock_of_another_writer_is_reported(
    copied: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "BUSY_S", 0.05)
    other = sqlite3.connect(copied, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with Library(copied) as library:
        with pytest.raises(DataError, match="another process is writing"):
            library.index(drawn, model="demo")
        assert library.search(k=100).total == 40  # readers are not blocked
        other.execute("ROLLBACK")
        assert library.index(drawn, model="demo").unchanged == 40


def test_full_disk_keeps_committed_batches(copied: Path, few: Path) -> None:
    long_folder = few.with_name("x" * 200)
    few.rename(long_folder)
    for path in list(long_folder.iterdir()):
        for i in range(20):
            shutil.copy(path, long_folder / f"{'y' * 200}{i}{path.name}")
    with Library(copied) as library:
        store = library._open()
        [(pages,)] = store.rows("PRAGMA page_count")
        store.rows(f"PRAGMA max_page_count={pages}")
        with pytest.raises(DataError, match="free some space"):
            library.index(long_folder, model="demo", batch_size=8)
        assert not library.verify()
    with Library(copied) as library:  # only whole batches were committed
        committed = library.search(k=1000).total - 40
        assert 0 <= committed < 100 and committed % 8 == 0
        assert library.index(long_folder).unchanged == committed


def test_read_only_indexes_can_be_searched(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    execute(copied, "PRAGMA journal_mode=WAL")
    # Root can write everything, so os.access is patched.
    monkeypatch.setattr(os, "access", lambda *_: False)
    with Library(copied) as library:
        assert library.search("a red circle", everything=True)
        with pytest.raises(DataError, match="cannot be written"):
            library.index()


def test_network_volumes_use_rollback_journal(tmp_path: Path, few: Path) -> None:
    assert not on_network(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "on_network", lambda _: True)
        with Library(tmp_path / "photos.db") as library:
            library.index(few, model="demo")
            assert library._open().rows("PRAGMA journal_mode") == [("delete",)]
            assert not library.verify(files=True)
