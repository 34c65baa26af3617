"""Care of an index: its status, checks, duplicates, folders that moved."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..terminal import Bar
from .file_hash import file_hash
from .near_duplicates import NEAR_COSINE, groups, near_pairs, similar_pairs
from .scan import Stamp
from .store import Store, absolute, is_within, relative
from .vectors import Vectors

LEVELS = ("exact", "near", "similar")
UNIT_TOLERANCE = 0.01  # deviation of a vector's length from 1, in float16
MAX_ERRORS = 1000  # listed by status
PATH_SQL = "SELECT root, path, hash, look, slot, coalesce(width, 0) * coalesce(height, 0) FROM file"


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that `verify` found.

    Attributes:
        where: A path, or the name of the index file.
        what: What is wrong, and what to do.
    """

    where: str
    what: str


def status(store: Store) -> dict[str, Any]:
    """What the index holds."""
    roots = store.roots()
    counts = dict(store.rows("SELECT root, count(*) FROM file GROUP BY root"))
    [(photos, errors, first, last)] = store.rows(
        "SELECT count(slot), count(error), min(taken), max(taken) FROM file"
    )
    failed = store.rows(
        "SELECT root, path, error FROM file WHERE error IS NOT NULL LIMIT ?", MAX_ERRORS
    )
    return {
        "index": str(store.path),
        "bytes": store.path.stat().st_size,
        "model": store.meta("model"),
        "dim": store.meta("dim"),
        "photos": photos,
        "first_taken": first,
        "last_taken": last,
        "folders": [
            {"path": os.fsdecode(path), "files": counts.get(number, 0)}
            for number, path in roots.items()
        ],
        "errors": errors,
        "failed": [
            {"path": os.fsdecode(absolute(roots[root], bytes(path))), "reason": reason}
            for root, path, reason in failed
        ],
    }


def verify(store: Store, *, files: bool = False) -> list[Problem]:
    """Check the database, every vector, and with `files` every photo."""
    name = str(store.path)
    found = [
        Problem(name, f"SQLite: {text}; restore a copy, or remove it and run index again")
        for (text,) in store.rows("PRAGMA integrity_check")
        if text != "ok"
    ]
    slots = {slot for (slot,) in store.rows("SELECT slot FROM file WHERE slot IS NOT NULL")}
    free = {slot for (slot,) in store.rows("SELECT slot FROM free_slot")}
    dim = store.meta("dim")
    if dim is not None:
        try:
            vectors = Vectors(store.connection, dim)
        except DataError as error:
            return [*found, Problem(name, str(error))]
        if slots & free or slots | free != set(range(len(vectors))):
            found.append(Problem(name, "vectors do not belong to files; run index with --rebuild"))
        else:
            order = sorted(slots)
            for start in range(0, len(order), 4096):
                lengths = np.linalg.norm(vectors.rows(order[start : start + 4096]), axis=1)
                if not (np.abs(lengths - 1) < UNIT_TOLERANCE).all():
                    found.append(Problem(name, "a vector is damaged; run index with --rebuild"))
                    break
    return [*found, *_changed_files(store)] if files else found


def _changed_files(store: Store) -> list[Problem]:
    roots, found = store.roots(), []
    for root, path, digest in store.rows("SELECT root, path, hash FROM file"):
        full = absolute(roots[root], bytes(path))
        name = os.fsdecode(full)
        try:
            status = Path(name).stat()
        except OSError as error:
            found.append(Problem(name, f"cannot be read ({error.strerror}); run index"))
            continue
        if digest and file_hash(full, Stamp(status.st_size, status.st_mtime_ns)) != digest:
            found.append(Problem(name, "has changed since it was indexed; run index"))
    return found


def find_duplicates(
    store: Store, vectors: Vectors, level: str, *, threshold: float = 0.95, quiet: bool = True
) -> list[list[str]]:
    """Groups of paths; see `Library.duplicates`."""
    if level not in LEVELS:
        raise DataError(f"there is no level {level!r}; choose {', '.join(LEVELS)}")
    if not -1 <= threshold <= 1:
        raise DataError(f"the threshold is {threshold}; cosine similarities are -1 to 1")
    rows = store.rows(f"{PATH_SQL} WHERE slot IS NOT NULL ORDER BY 6 DESC, root, path")
    by_hash: dict[bytes, int] = {}
    pairs = [
        (by_hash.setdefault(digest, i), i) for i, (_, _, digest, *_) in enumerate(rows) if digest
    ]
    slots = [row[4] for row in rows]
    if level == "near":
        looks = [row[3] or 0 for row in rows]
        for a, b in near_pairs(looks):
            one, other = vectors.rows([slots[a], slots[b]])
            if one @ other >= NEAR_COSINE:
                pairs.append((a, b))
    elif level == "similar":
        with Bar(len(rows), "photos", quiet=quiet) as bar:
            pairs += similar_pairs(vectors.rows(slots), threshold, bar.advance)
    roots = store.roots()
    names = [os.fsdecode(absolute(roots[row[0]], bytes(row[1]))) for row in rows]
    return [[names[i] for i in group] for group in groups(pairs, len(rows))]


def relocate(store: Store, old: Path, new: Path) -> int:
    """Give all roots in a folder their new place; see `Library.relocate`."""
    before, after = (os.fsencode(os.path.abspath(path)) for path in (old, new))  # noqa: PTH100
    if not new.is_dir():
        raise DataError(f"{new}: is not a folder; give the place where {old.name} is now")
    roots = store.roots()
    moved = {number: path for number, path in roots.items() if is_within(path, before)}
    if not moved:
        known = ", ".join(os.fsdecode(path) for path in roots.values())[:400]
        raise DataError(f"{old}: no folder of the index is there; it has {known or 'none'}")
    targets = {number: _joined(after, relative(path, before)) for number, path in moved.items()}
    others = [path for number, path in roots.items() if number not in moved]
    for target in targets.values():
        if any(is_within(target, other) or is_within(other, target) for other in others):
            raise DataError(
                f"{os.fsdecode(target)}: is in the index already; run index there, which re-uses "
                "the vectors"
            )
    with store.transaction() as connection:
        connection.executemany(
            "UPDATE root SET path=? WHERE id=?", [(path, n) for n, path in targets.items()]
        )
    marks = ", ".join("?" * len(moved))
    [(count,)] = store.rows(f"SELECT count(*) FROM file WHERE root IN ({marks})", *moved)
    return int(count)


def _joined(folder: bytes, inside: bytes) -> bytes:
    return absolute(folder, inside) if inside else folder
