"""Index maintenance: status, verification, duplicates and moved folders."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..terminal import Bar
from .file_hash import file_hash
from .near_duplicates import NEAR_COSINE, connected_components, near_pairs, similar_pairs
from .scan import Stamp
from .store import Store, absolute, is_within, relative
from .vectors import Vectors

LEVELS = ("exact", "near", "similar")
UNIT_TOLERANCE = 0.01  # of the norm of a float16 unit vector
MAX_ERRORS = 1000  # listed by status
PATH_SQL = "SELECT root, path, hash, look, slot, coalesce(width, 0) * coalesce(height, 0) FROM file"


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem found by `verify`.

    Attributes:
        where: Path of a photo or of the index file.
        what: What is wrong, and what to do.
    """

    where: str
    what: str


def status(store: Store) -> dict[str, Any]:
    """Contents of the index; see `Library.status`."""
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
    """Check the database and all vectors; with `files`, also check that photos are unchanged."""
    name = str(store.path)
    problems = [
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
            return [*problems, Problem(name, str(error))]
        if slots & free or slots | free != set(range(len(vectors))):
            problems.append(Problem(name, "vectors do not match files; run index with --rebuild"))
        else:
            order = sorted(slots)
            for start in range(0, len(order), 4096):
                lengths = np.linalg.norm(vectors.rows(order[start : start + 4096]), axis=1)
                if not (np.abs(lengths - 1) < UNIT_TOLERANCE).all():
                    problems.append(Problem(name, "a vector is damaged; run index with --rebuild"))
                    break
    return [*problems, *_changed_files(store)] if files else problems


def _changed_files(store: Store) -> list[Problem]:
    roots, problems = store.roots(), []
    for root, path, digest in store.rows("SELECT root, path, hash FROM file"):
        full = absolute(roots[root], bytes(path))
        name = os.fsdecode(full)
        try:
            status = Path(name).stat()
        except OSError as error:
            problems.append(Problem(name, f"cannot be read ({error.strerror}); run index"))
            continue
        if digest and file_hash(full, Stamp(status.st_size, status.st_mtime_ns)) != digest:
            problems.append(Problem(name, "has changed since it was indexed; run index"))
    return problems


def find_duplicates(
    store: Store, vectors: Vectors, level: str, *, threshold: float = 0.95, quiet: bool = True
) -> list[list[str]]:
    """Find duplicates; see `Library.duplicates`."""
    if level not in LEVELS:
        raise DataError(f"unknown level {level!r}; choose {', '.join(LEVELS)}")
    if not -1 <= threshold <= 1:
        raise DataError(f"threshold {threshold} is not a cosine similarity; use -1 to 1")
    rows = store.rows(f"{PATH_SQL} WHERE slot IS NOT NULL ORDER BY 6 DESC, root, path")
    by_hash: dict[bytes, int] = {}
    pairs = [
        (by_hash.setdefault(digest, i), i) for i, (_, _, digest, *_) in enumerate(rows) if digest
    ]
    slots = [row[4] for row in rows]
    if level == "near":
        hashes = [row[3] or 0 for row in rows]
        for a, b in near_pairs(hashes):
            one, other = vectors.rows([slots[a], slots[b]])
            if one @ other >= NEAR_COSINE:
                pairs.append((a, b))
    elif level == "similar":
        with Bar(len(rows), "photos", quiet=quiet) as bar:
            pairs += similar_pairs(vectors.rows(slots), threshold, bar.advance)
    roots = store.roots()
    names = [os.fsdecode(absolute(roots[row[0]], bytes(row[1]))) for row in rows]
    return [[names[i] for i in group] for group in connected_components(pairs, len(rows))]


def relocate(store: Store, old: Path, new: Path) -> int:
    """Update the paths of all roots in a folder; see `Library.relocate`."""
    old_path, new_path = (os.fsencode(os.path.abspath(path)) for path in (old, new))  # noqa: PTH100
    if not new.is_dir():
        raise DataError(f"{new}: is not a folder; give the path where {old.name} is now")
    roots = store.roots()
    moved = {number: path for number, path in roots.items() if is_within(path, old_path)}
    if not moved:
        known = ", ".join(os.fsdecode(path) for path in roots.values())[:400]
        raise DataError(f"{old}: contains no indexed folder; the index has {known or 'none'}")
    targets = {number: _join(new_path, relative(path, old_path)) for number, path in moved.items()}
    other_roots = [path for number, path in roots.items() if number not in moved]
    for target in targets.values():
        if any(is_within(target, other) or is_within(other, target) for other in other_roots):
            raise DataError(
                f"{os.fsdecode(target)}: is already in the index; run index there, which reuses "
                "the vectors"
            )
    with store.transaction() as connection:
        connection.executemany(
            "UPDATE root SET path=? WHERE id=?", [(path, n) for n, path in targets.items()]
        )
    placeholders = ", ".join("?" * len(moved))
    [(count,)] = store.rows(f"SELECT count(*) FROM file WHERE root IN ({placeholders})", *moved)
    return int(count)


def _join(folder: bytes, inside: bytes) -> bytes:
    return absolute(folder, inside) if inside else folder
