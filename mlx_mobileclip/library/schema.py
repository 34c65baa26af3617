"""The index file: an SQLite database, its schema, migrations and journal modes."""

import os
import re
import sqlite3
import stat
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from ..errors import DataError
from ..paths import user_path
from ..terminal import say

APPLICATION_ID = 0x4D434C50  # "MCLP"
PAGE_SIZE = 16384
BUSY_S = 5.0  # wait for a lock of another process
INDEX_NAME = "photos.db"
CREATE_EXCLUSIVE = os.O_RDWR | os.O_CREAT | os.O_EXCL

# Paths are bytes, as file names need not be UTF-8. A file without a slot has no vector: it was
# unreadable, or is pending.
FIRST_SCHEMA = """
CREATE TABLE meta(key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE root(id INTEGER PRIMARY KEY, path BLOB NOT NULL UNIQUE);
CREATE TABLE file(
  id INTEGER PRIMARY KEY, root INTEGER NOT NULL REFERENCES root(id), path BLOB NOT NULL,
  size INTEGER, mtime_ns INTEGER, hash BLOB, taken TEXT, camera TEXT, latitude REAL,
  longitude REAL, width INTEGER, height INTEGER, look INTEGER, slot INTEGER UNIQUE, error TEXT,
  UNIQUE(root, path)
);
CREATE INDEX file_hash ON file(hash);
CREATE TABLE vector(chunk INTEGER PRIMARY KEY, rows BLOB NOT NULL);
CREATE TABLE free_slot(slot INTEGER PRIMARY KEY);
CREATE TABLE text(key BLOB PRIMARY KEY, vector BLOB NOT NULL);
"""
MIGRATIONS = (FIRST_SCHEMA,)  # item n migrates from version n to n + 1
TABLES = {"meta", "root", "file", "vector", "free_slot", "text"}
# Network file systems, where WAL does not work: it needs memory shared by all processes.
NETWORK = re.compile(r"nfs|cifs|smb|afp|webdav|sshfs|9p|ceph|gluster|lustre|afs$|fuse\.rclone")
ESCAPED_SPACE = "\\040"
MOUNT_LINE = re.compile(r"^.* on (.*) \((\w+)[,)]", re.MULTILINE)  # output of mount(8) on macOS


def default_index() -> Path:
    """Path of the user's index, in the platform's application data directory."""
    if sys.platform == "darwin":
        return user_path("~/Library/Application Support/mlx-mobileclip") / INDEX_NAME
    data_dir = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return user_path(data_dir) / "mlx-mobileclip" / INDEX_NAME


@contextmanager
def index_errors(path: Path) -> Iterator[None]:
    """Convert SQLite errors to one-line DataErrors with a remedy."""
    try:
        yield
    except sqlite3.Error as error:
        text = str(error)
        if "locked" in text or "busy" in text:
            remedy = "another process is writing it; wait for it and run the same command again"
        elif "full" in text:
            remedy = "free some space and run the same command again: finished photos are kept"
        elif "readonly" in text or "unable to open" in text:
            remedy = "no permission, or a read-only volume; choose another with --index"
        elif "not a database" in text:
            remedy = "is not an index; choose another with --index"
        elif "malformed" in text or "corrupt" in text:
            remedy = "is damaged; restore a copy, or remove it and run index again"
        else:
            remedy = "try verify, or remove it and run index again"
        raise DataError(f"{path}: {remedy} (SQLite: {text[:200]})") from error


def open_index(path: Path, *, create: bool = False) -> sqlite3.Connection:
    """Open an index, for writing if possible.

    Args:
        path: The file.
        create: Create the file and its directory if missing, readable only by the user.

    Raises:
        DataError: it does not exist, or cannot be used.
    """
    with index_errors(path):
        if not os.path.lexists(path):
            if not create:
                raise DataError(f"{path}: no index; make one with: mlx-mobileclip index PATH")
            _create(path)
        _check_file(path)
        connection = _connect(path)
        try:
            _prepare(connection, path)
        except BaseException:
            connection.close()
            raise
        return connection


def is_writable(connection: sqlite3.Connection) -> bool:
    """Whether the index was opened for writing."""
    return not connection.execute("PRAGMA query_only").fetchone()[0]


def _create(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, CREATE_EXCLUSIVE, 0o600))
    except FileExistsError:
        pass  # created meanwhile by another process
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be created ({reason}); choose another --index") from error


def _check_file(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({reason}); choose another --index") from error
    if not stat.S_ISREG(mode):  # SQLite would block on a pipe
        raise DataError(f"{path}: is not a file; choose another --index")


def _connect(path: Path) -> sqlite3.Connection:
    """Connect for writing, else read-only, else without locks as on a read-only volume."""
    if os.access(path, os.W_OK) and os.access(path.absolute().parent, os.W_OK):
        connection = _connect_uri(path, "mode=rw")
        connection.execute("PRAGMA query_only=0")
        return connection
    for options in ("mode=ro", "mode=ro&immutable=1"):
        connection = _connect_uri(path, options)
        try:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.OperationalError:
            connection.close()
            continue
        connection.execute("PRAGMA query_only=1")
        if "immutable" in options and _size_or_zero(Path(f"{path}-wal")):
            say(f"note: {path}: recent changes are in {path.name}-wal, which cannot be read here")
        return connection
    raise DataError(f"{path}: cannot be opened; check its permissions, or choose another --index")


def _size_or_zero(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0


def _connect_uri(path: Path, options: str) -> sqlite3.Connection:
    uri = f"file:{quote(os.fsencode(path.absolute()))}?{options}"
    connection = sqlite3.connect(
        uri, uri=True, isolation_level=None, timeout=BUSY_S, check_same_thread=False
    )
    # Do not run functions of a foreign schema, and do not trust damaged pages.
    connection.execute("PRAGMA trusted_schema=OFF")
    connection.execute("PRAGMA cell_size_check=ON")
    return connection


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Check that the file is an index, and migrate its schema."""
    empty = not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if empty and is_writable(connection):
        connection.execute(f"PRAGMA page_size={PAGE_SIZE}")
    [application] = connection.execute("PRAGMA application_id").fetchone()
    if application != APPLICATION_ID and not (empty and application == 0):
        raise DataError(f"{path}: is a database of another program; choose another --index")
    [version] = connection.execute("PRAGMA user_version").fetchone()
    if version > len(MIGRATIONS):
        raise DataError(
            f"{path}: was written by a newer version of this package; update it, or choose another "
            "--index"
        )
    if is_writable(connection):
        mode = "DELETE" if on_network(path) else "WAL"
        connection.execute(f"PRAGMA journal_mode={mode}").fetchone()  # may not be granted
        connection.execute("PRAGMA synchronous=NORMAL" if mode == "WAL" else "PRAGMA synchronous=2")
        if version < len(MIGRATIONS):
            _migrate(connection)
    elif version < len(MIGRATIONS):
        raise DataError(f"{path}: has an older schema and is read-only; use a writable copy")
    with closing(connection.execute("SELECT type, name FROM sqlite_master")) as cursor:
        objects = cursor.fetchall()
    tables = {name for kind, name in objects if kind == "table"}
    if {kind for kind, _ in objects} - {"table", "index"} or not tables >= TABLES:
        raise DataError(f"{path}: its tables are not those of an index; choose another --index")


def _migrate(connection: sqlite3.Connection) -> None:
    """Run missing migrations in one transaction, unless another process just did."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        [version] = connection.execute("PRAGMA user_version").fetchone()
        for migration in MIGRATIONS[version:]:
            for statement in migration.split(";"):
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version={len(MIGRATIONS)}")
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise


def on_network(path: Path) -> bool:
    """Whether a path is on a network volume, according to the mount table."""
    try:
        mounts = Path("/proc/self/mounts").read_text(errors="surrogateescape")
    except OSError:
        mounts = _macos_mounts()
    best, kind = "", ""
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        mount_point = fields[1].replace(ESCAPED_SPACE, " ")
        if len(mount_point) >= len(best) and path.resolve().is_relative_to(mount_point):
            best, kind = mount_point, fields[2]
    return bool(NETWORK.search(kind))


def _macos_mounts() -> str:
    """Output of mount(8) in the format of /proc/self/mounts."""
    import subprocess

    try:
        output = subprocess.run(["/sbin/mount"], capture_output=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    text = os.fsdecode(output)
    mounts = [(point.replace(" ", ESCAPED_SPACE), kind) for point, kind in MOUNT_LINE.findall(text)]
    return "\n".join(f"- {point} {kind}" for point, kind in mounts)
