"""Rows of files in the index: what is known, what changes, in transactions."""

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .metadata import Metadata
from .scan import Stamp
from .schema import default_index, index_errors, is_writable, open_index
from .vectors import CHUNK_ROWS, take_slots, write_vectors

COLUMNS = (
    *("size", "mtime_ns", "hash", "taken", "camera", "latitude", "longitude", "width", "height"),
    *("look", "error"),
)
SET_COLUMNS = ", ".join(f"{name}=excluded.{name}" for name in (*COLUMNS, "slot"))


@dataclass(slots=True)
class Photo:
    """What the index keeps of a file besides its vector."""

    path: bytes  # relative to its root
    stamp: Stamp | None = None
    hash: bytes | None = None
    metadata: Metadata = field(default_factory=Metadata)
    width: int | None = None
    height: int | None = None
    look: int | None = None
    error: str | None = None

    def values(self) -> tuple[Any, ...]:
        """Values of COLUMNS."""
        stamp, data = self.stamp, self.metadata
        return (
            *((stamp.size, stamp.mtime_ns) if stamp else (None, None)),
            *(self.hash, data.taken, data.camera, data.latitude, data.longitude),
            *(self.width, self.height, self.look, self.error),
        )


@dataclass(frozen=True, slots=True)
class Known:
    """What a scan compares a file with."""

    id: int
    size: int | None
    mtime_ns: int | None
    error: str | None
    has_vector: bool

    def is_current(self, stamp: Stamp | None) -> bool:
        """Whether the file has not changed since it was indexed."""
        if not self.has_vector and self.error is None:
            return False
        return (self.size, self.mtime_ns) == (
            (stamp.size, stamp.mtime_ns) if stamp else (None, None)
        )


class Store:
    """An open index."""

    def __init__(self, path: str | os.PathLike[str] | None = None, *, create: bool = False):
        """Open it; see `open_index`."""
        self.path = Path(path) if path is not None else default_index()
        self.connection = open_index(self.path, create=create)
        self.writable = is_writable(self.connection)

    def close(self) -> None:
        """Close the file."""
        self.connection.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All that is written within is kept, or nothing of it."""
        with index_errors(self.path):
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield self.connection
                self.connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # SQLite may have rolled back itself
                    self.connection.execute("ROLLBACK")
                raise

    def rows(self, sql: str, *values: Any) -> list[Any]:
        """All rows of a query."""
        with index_errors(self.path):
            return self.connection.execute(sql, values).fetchall()

    def meta(self, key: str) -> Any:
        """A setting of the index; None if it is not set."""
        found = self.rows("SELECT value FROM meta WHERE key=?", key)
        return found[0][0] if found else None

    def set_meta(self, **values: Any) -> None:
        """Set settings of the index."""
        with self.transaction() as connection:
            connection.executemany("INSERT OR REPLACE INTO meta VALUES(?, ?)", values.items())

    def roots(self) -> dict[int, bytes]:
        """Absolute paths of the roots by id."""
        return {number: bytes(path) for number, path in self.rows("SELECT id, path FROM root")}

    def root_for(self, folder: bytes) -> tuple[int, bytes]:
        """The root that contains a folder, and the root's path; a new one if there is none.

        Roots within a new one become part of it.
        """
        roots = self.roots()
        for number, path in roots.items():
            if is_within(folder, path):
                return number, path
        with self.transaction() as connection:
            number = (
                connection.execute("INSERT INTO root(path) VALUES(?)", (folder,)).lastrowid or 0
            )
            for other, path in roots.items():
                if is_within(path, folder):
                    prefix = relative(path, folder) + b"/"
                    connection.execute(
                        "UPDATE file SET root=?, path=CAST(? || path AS BLOB) WHERE root=?",
                        (number, prefix, other),
                    )
                    connection.execute("DELETE FROM root WHERE id=?", (other,))
        return number, folder

    def known(self, root: int, under: bytes) -> dict[bytes, Known]:
        """Files of a root within a folder, by their relative path."""
        rows = self.rows(
            "SELECT path, id, size, mtime_ns, error, slot IS NOT NULL FROM file WHERE root=?", root
        )
        return {
            bytes(path): Known(number, size, mtime, error, bool(has_vector))
            for path, number, size, mtime, error, has_vector in rows
            if not under or is_within(path, under)
        }

    def put(
        self, root: int, photos: Sequence[Photo], vectors: Sequence[NDArray[np.float16] | None]
    ) -> None:
        """Insert or replace files with their vectors; None for those that could not be read."""
        with self.transaction() as connection:
            old = [
                connection.execute(
                    "SELECT slot FROM file WHERE root=? AND path=?", (root, photo.path)
                ).fetchone()
                for photo in photos
            ]
            freed = [(row[0],) for row in old if row and row[0] is not None]
            connection.executemany("INSERT OR IGNORE INTO free_slot VALUES(?)", freed)
            rows = [vector for vector in vectors if vector is not None]
            slots = take_slots(connection, len(rows))
            if rows:
                write_vectors(connection, slots, np.stack(rows))
            remaining = iter(slots)
            values = [
                (root, photo.path, *photo.values(), None if vector is None else next(remaining))
                for photo, vector in zip(photos, vectors, strict=True)
            ]
            # A freed slot may go to another of these files before its own row is replaced.
            connection.executemany(
                "UPDATE file SET slot=NULL WHERE root=? AND path=?", [row[:2] for row in values]
            )
            connection.executemany(
                f"INSERT INTO file(root, path, {', '.join(COLUMNS)}, slot) "
                f"VALUES({', '.join('?' * (len(COLUMNS) + 3))}) "
                f"ON CONFLICT(root, path) DO UPDATE SET {SET_COLUMNS}",
                values,
            )

    def copy_of(self, digest: bytes) -> tuple[Photo, int] | None:
        """A file with the same content that has a vector: its data, and its slot."""
        found = self.rows(
            f"SELECT path, {', '.join(COLUMNS)}, slot FROM file "
            "WHERE hash=? AND slot IS NOT NULL LIMIT 1",
            digest,
        )
        if not found:
            return None
        path, size, mtime, digest, taken, camera, lat, lon, width, height, look, error, slot = (
            found[0]
        )
        metadata = Metadata(taken, camera, lat, lon)
        stamp = Stamp(size or 0, mtime or 0)
        return Photo(bytes(path), stamp, digest, metadata, width, height, look, error), slot

    def vector(self, slot: int, dim: int) -> NDArray[np.float16]:
        """The vector in a slot, float16 (E,)."""
        chunk, row = divmod(slot, CHUNK_ROWS)
        sql = "SELECT substr(rows, ?, ?) FROM vector WHERE chunk=?"
        [(data,)] = self.rows(sql, 1 + row * 2 * dim, 2 * dim, chunk)
        return np.frombuffer(data, np.float16)

    def drop(self, ids: Sequence[int]) -> None:
        """Remove files."""
        with self.transaction() as connection:
            values = [(number,) for number in ids]
            connection.executemany(
                "INSERT OR IGNORE INTO free_slot SELECT slot FROM file "
                "WHERE id=? AND slot IS NOT NULL",
                values,
            )
            connection.executemany("DELETE FROM file WHERE id=?", values)

    def moved(self, ids: Sequence[int]) -> list[int]:
        """Those of some files whose content another file of the index has, too."""
        gone = set(ids)
        return [
            number
            for number in ids
            if any(
                other not in gone
                for (other,) in self.rows(
                    "SELECT id FROM file WHERE hash=(SELECT hash FROM file WHERE id=?)", number
                )
            )
        ]

    def forget_vectors(self) -> None:
        """Remove all vectors and texts, so that every file is embedded again."""
        with self.transaction() as connection:
            for statement in (
                "UPDATE file SET slot=NULL, error=NULL",
                "DELETE FROM vector",
                "DELETE FROM free_slot",
                "DELETE FROM text",
            ):
                connection.execute(statement)


def is_within(path: bytes, folder: bytes) -> bool:
    """Whether a path is a folder or lies within it."""
    return path == folder or path.startswith(folder.rstrip(b"/") + b"/")


def relative(path: bytes, folder: bytes) -> bytes:
    """A path within a folder, relative to it; empty for the folder itself."""
    return b"" if path == folder else path[len(folder.rstrip(b"/")) + 1 :]


def absolute(root: bytes, path: bytes) -> bytes:
    """The absolute path of a file of a root."""
    return root.rstrip(b"/") + b"/" + path
