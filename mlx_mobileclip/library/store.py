"""Read and write the file rows of an index."""

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
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
    """Index entry of a file, without its vector."""

    path: bytes  # relative to its root
    stamp: Stamp | None = None
    hash: bytes | None = None
    metadata: Metadata = field(default_factory=Metadata)
    width: int | None = None
    height: int | None = None
    perceptual_hash: int | None = None
    error: str | None = None

    def values(self) -> tuple[Any, ...]:
        """Values in the order of COLUMNS."""
        stamp, data = self.stamp, self.metadata
        return (
            *((stamp.size, stamp.mtime_ns) if stamp else (None, None)),
            *(self.hash, data.taken, data.camera, data.latitude, data.longitude),
            *(self.width, self.height, self.perceptual_hash, self.error),
        )


@dataclass(frozen=True, slots=True)
class IndexedFile:
    """State of an indexed file, compared with a scan."""

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
        """Commit all writes of the block, or roll all of them back."""
        with index_errors(self.path):
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield self.connection
                self.connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # SQLite may have rolled back already
                    self.connection.execute("ROLLBACK")
                raise

    def rows(self, sql: str, *values: Any) -> list[Any]:
        """All rows of a query."""
        with index_errors(self.path):
            return self.connection.execute(sql, values).fetchall()

    def meta(self, key: str) -> Any:
        """A setting of the index, or None."""
        found = self.rows("SELECT value FROM meta WHERE key=?", key)
        if found and not isinstance(found[0][0], int if key == "dim" else str):
            raise DataError(f"{self.path}: its setting {key} is damaged; run index with --rebuild")
        return found[0][0] if found else None

    def set_meta(self, **values: Any) -> None:
        """Change settings of the index."""
        with self.transaction() as connection:
            connection.executemany("INSERT OR REPLACE INTO meta VALUES(?, ?)", values.items())

    def roots(self) -> dict[int, bytes]:
        """Absolute paths of the indexed folders, by id."""
        return {number: bytes(path) for number, path in self.rows("SELECT id, path FROM root")}

    def root_for(self, folder: bytes) -> tuple[int, bytes]:
        """Return id and path of the root that contains a folder; add one if there is none.

        Existing roots within a new one are merged into it.
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

    def indexed_files(self, root: int, under: bytes) -> dict[bytes, IndexedFile]:
        """Indexed files of a root in a folder, by relative path."""
        rows = self.rows(
            "SELECT path, id, size, mtime_ns, error, slot IS NOT NULL FROM file WHERE root=?", root
        )
        return {
            bytes(path): IndexedFile(number, size, mtime, error, bool(has_vector))
            for path, number, size, mtime, error, has_vector in rows
            if not under or is_within(path, under)
        }

    def put(
        self, root: int, photos: Sequence[Photo], vectors: Sequence[NDArray[np.float16] | None]
    ) -> None:
        """Insert or replace files with their vectors; None for unreadable files."""
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
            # A freed slot may be reassigned before the row that held it is replaced.
            connection.executemany(
                "UPDATE file SET slot=NULL WHERE root=? AND path=?", [row[:2] for row in values]
            )
            connection.executemany(
                f"INSERT INTO file(root, path, {', '.join(COLUMNS)}, slot) "
                f"VALUES({', '.join('?' * (len(COLUMNS) + 3))}) "
                f"ON CONFLICT(root, path) DO UPDATE SET {SET_COLUMNS}",
                values,
            )

    def find_by_hash(self, digest: bytes) -> tuple[Photo, int] | None:
        """Find an embedded file with this content hash; returns its entry and slot."""
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
        """Remove files and free their slots."""
        with self.transaction() as connection:
            values = [(number,) for number in ids]
            connection.executemany(
                "INSERT OR IGNORE INTO free_slot SELECT slot FROM file "
                "WHERE id=? AND slot IS NOT NULL",
                values,
            )
            connection.executemany("DELETE FROM file WHERE id=?", values)

    def with_copies(self, ids: Sequence[int]) -> list[int]:
        """Ids of the files whose content is also indexed under another path."""
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

    def delete_vectors(self) -> None:
        """Delete all vectors and cached texts, so that every file is embedded again."""
        with self.transaction() as connection:
            for statement in (
                "UPDATE file SET slot=NULL, error=NULL",
                "DELETE FROM vector",
                "DELETE FROM free_slot",
                "DELETE FROM text",
            ):
                connection.execute(statement)


def is_within(path: bytes, folder: bytes) -> bool:
    """Whether a path is a folder itself or inside it."""
    return path == folder or path.startswith(folder.rstrip(b"/") + b"/")


def relative(path: bytes, folder: bytes) -> bytes:
    """Path relative to a folder that contains it; empty for the folder itself."""
    return b"" if path == folder else path[len(folder.rstrip(b"/")) + 1 :]


def absolute(root: bytes, path: bytes) -> bytes:
    """Absolute path of a file in a root."""
    return root.rstrip(b"/") + b"/" + path
