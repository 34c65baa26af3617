"""Search an index: scan all vectors, calibrate, filter and rank."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..preprocess.image import find_image
from . import relevance
from .match import Match
from .near_duplicates import NEAR_COSINE, hashes_match
from .queries import Query, filter_slots, load_index_model
from .results import SearchResults
from .scan import Stamp
from .store import Store, absolute
from .vectors import Vectors

# Best photos of the scan, which are rescored exactly.
MIN_CANDIDATES = 256
MAX_CANDIDATES = 4096
SAMPLE_SIZE = 128  # photos that serve as contrasts for an image query
SORTS = ("relevance", "date")
Embed = Callable[[Sequence[str]], NDArray[np.float32]]
MATCH_COLUMNS = "root, path, taken, camera, latitude, longitude, width, height, size, hash, look"


@dataclass
class _QueryPart:
    """One text or image of a query.

    Attributes:
        vector: Unit vector (E,).
        contrasts: Sets of contrasting vectors (M, E): texts, or photos of the library.
        mean, std: Statistics of its scores over the library.
    """

    vector: NDArray[np.float32]
    contrasts: list[NDArray[np.float32]]
    mean: float = 0.0
    std: float = 1.0

    def z(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Combined z-scores (N,) of photos (N, E)."""
        scores = rows @ self.vector
        z: NDArray[np.float32] = ((scores - self.mean) / self.std).astype(np.float32)
        others = [relevance.contrast_z_scores(scores, rows, vectors) for vectors in self.contrasts]
        return relevance.combine(z, np.minimum.reduce(others))


def search(
    store: Store,
    vectors: Vectors,
    embed: Embed,
    query: Query,
    *,
    k: int = 20,
    sort: str = "relevance",
    dedupe: bool = False,
    everything: bool = False,
) -> SearchResults:
    """Find the photos that match a query; see `Library.search`.

    Args:
        store: The index.
        vectors: Embeddings of its photos.
        embed: Computes text embeddings.
        query: Texts, images and filters.
        k: Maximum number of photos.
        sort: "relevance" or "date".
        dedupe: Omit near duplicates of a better match.
        everything: Return the k nearest photos, relevant or not.

    Raises:
        DataError: an argument cannot be used, or an image cannot be found.
    """
    if k < 1:
        raise DataError(f"k is {k}; ask for at least 1 photo")
    if sort not in SORTS:
        raise DataError(f"cannot sort by {sort!r}; choose {' or '.join(SORTS)}")
    live = np.ones(len(vectors), bool)
    free = [slot for (slot,) in store.rows("SELECT slot FROM free_slot") if slot < len(live)]
    live[free] = False
    images = _image_parts(store, query.like, vectors, live) if query.like else []
    wanted = [*_text_parts(query.texts, embed), *images]
    excluded = _text_parts(query.without, embed)
    photos = int(live.sum())
    allowed = _allowed_mask(store, query, live)
    if not wanted:
        if excluded:
            raise DataError("only excluded texts; also say what to look for")
        return _filter_only(store, query, allowed, k, photos)
    scan_scores = _scan(vectors, wanted, excluded, live)
    calibrated = photos >= relevance.MIN_PHOTOS and not everything
    size = max(MIN_CANDIDATES, 4 * k)
    while True:
        slots = _top_slots(scan_scores, allowed, size)
        rows = vectors.rows(slots)
        z, order = _rank(rows, wanted, excluded)
        count = len(order)
        if calibrated:
            count = relevance.count_relevant(z[order], int(allowed.sum()))
        # If all candidates are relevant, there may be more.
        if count < len(order) or not calibrated or size >= min(MAX_CANDIDATES, allowed.sum()):
            break
        size *= 4
    cosines = rows @ wanted[0].vector

    def matches(order: NDArray[np.intp]) -> list[Match]:
        return _matches(store, slots[order], z[order], cosines[order])

    nearest = matches(order[:1]) if not count else []
    order = order[:count]
    if dedupe:
        found = _without_duplicates(matches(order), rows[order])
        count = len(found)
    else:
        found = matches(order[:k])
    found = found[:k]
    if sort == "date":
        found.sort(key=lambda match: match.taken or "", reverse=True)
    return SearchResults(
        query.name,
        found,
        total=count if calibrated else len(found),
        photos=photos,
        calibrated=calibrated,
        nearest=nearest[0] if nearest else None,
    )


def _scan(
    vectors: Vectors,
    wanted: Sequence[_QueryPart],
    excluded: Sequence[_QueryPart],
    live: NDArray[np.bool_],
) -> NDArray[np.float32]:
    """Set each part's mean and std; returns the minimum z-scores of the wanted parts (N,)."""
    parts = [*wanted, *excluded]
    scores = vectors.scores(np.stack([part.vector for part in parts]))
    for part, row in zip(parts, scores, strict=True):
        part.mean, part.std = relevance.score_statistics(row[live]) if live.any() else (0.0, 1.0)
    z = [(row - part.mean) / part.std for part, row in zip(wanted, scores, strict=False)]
    return z[0] if len(z) == 1 else np.minimum.reduce(z)


def _rank(
    rows: NDArray[np.float32], wanted: Sequence[_QueryPart], excluded: Sequence[_QueryPart]
) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """z-scores of photos (N, E), and indices without excluded photos, the best first."""
    z: NDArray[np.float32] = np.minimum.reduce([part.z(rows) for part in wanted])
    for part in excluded:
        z[relevance.is_significant(part.z(rows))] = -np.inf
    order = np.argsort(-z, kind="stable")
    return z, order[np.isfinite(z[order])]


def _text_parts(texts: Sequence[str], embed: Embed) -> list[_QueryPart]:
    parts = []
    for text in texts:
        if not text.strip():
            raise DataError("the query is empty; say what to look for")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise DataError("the query is not UTF-8 text")
        others = relevance.contrast_texts(text)
        rows = embed([text, *others, *relevance.COMMON_TEXTS])
        parts.append(_QueryPart(rows[0], [rows[1 : 1 + len(others)], rows[1 + len(others) :]]))
    return parts


def _image_parts(
    store: Store,
    images: Sequence[str | os.PathLike[str]],
    vectors: Vectors,
    live: NDArray[np.bool_],
) -> list[_QueryPart]:
    """Image embeddings, from the index if it has the same content, else by the model."""
    from .file_hash import file_hash

    parts, missing = [], []
    slots = np.flatnonzero(live)
    sample = vectors.rows(slots[:: -(-len(slots) // SAMPLE_SIZE) or 1])
    for image in images:
        path = find_image(image)
        status = path.stat()
        digest = file_hash(os.fsencode(path), Stamp(status.st_size, status.st_mtime_ns))
        indexed = store.find_by_hash(digest) if digest else None
        if indexed is None:
            missing.append(os.fspath(image))
        else:
            row = vectors.rows([indexed[1]])[0]
            parts.append(_QueryPart(row / np.linalg.norm(row), [sample]))
    if missing:
        model, processor = load_index_model(store, whole=True)
        rows = np.asarray(model.encode_image(processor.images(missing), normalize=True))
        parts += [_QueryPart(row, [sample]) for row in rows.astype(np.float32)]
    return parts


def _allowed_mask(store: Store, query: Query, live: NDArray[np.bool_]) -> NDArray[np.bool_]:
    slots = filter_slots(store, query)
    if slots is None:
        return live
    mask = np.zeros_like(live)
    mask[slots[slots < len(mask)]] = True
    return mask & live


def _top_slots(z: NDArray[np.float32], allowed: NDArray[np.bool_], count: int) -> NDArray[np.intp]:
    """Slots of the `count` best allowed photos, unordered."""
    slots = np.flatnonzero(allowed)
    if count >= len(slots):
        return slots
    best: NDArray[np.intp] = slots[np.argpartition(-z[slots], count)[:count]]
    return best


def _filter_only(
    store: Store, query: Query, allowed: NDArray[np.bool_], k: int, photos: int
) -> SearchResults:
    """Results of a query with filters only, the newest first."""
    slots = np.flatnonzero(allowed)
    zeros = np.zeros(len(slots), np.float32)
    found = _matches(store, slots, zeros, zeros)
    found.sort(key=lambda match: match.taken or "", reverse=True)
    return SearchResults(query.name, found[:k], total=len(found), photos=photos, calibrated=False)


def _matches(
    store: Store, slots: NDArray[np.intp], z: NDArray[np.float32], cosines: NDArray[np.float32]
) -> list[Match]:
    roots = store.roots()
    found = []
    for slot, relevance_z, cosine in zip(slots.tolist(), z.tolist(), cosines.tolist(), strict=True):
        # There is no row if another process has just removed the file.
        for row in store.rows(f"SELECT {MATCH_COLUMNS} FROM file WHERE slot=?", slot):
            root, path, *rest = row
            name = os.fsdecode(absolute(roots.get(root, b""), bytes(path)))
            found.append(Match(name, relevance_z, cosine, *rest))
    return found


def _without_duplicates(matches: list[Match], rows: NDArray[np.float32]) -> list[Match]:
    """Remove duplicates and near duplicates of better matches."""
    kept: list[int] = []
    for i, match in enumerate(matches):
        if not any(
            match.hash == matches[j].hash
            or (hashes_match(match.look, matches[j].look) and rows[i] @ rows[j] >= NEAR_COSINE)
            for j in kept
        ):
            kept.append(i)
    return [matches[i] for i in kept]
