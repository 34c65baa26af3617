"""Search the vectors of an index: scan all, calibrate, filter, rank."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..preprocess.image import find_image
from . import relevance
from .match import Match
from .near_duplicates import NEAR_COSINE, near
from .queries import Query, filter_slots, load_recorded
from .results import SearchResults
from .scan import Stamp
from .store import Store, absolute
from .vectors import Vectors

# Best by the scan, which are looked at exactly.
FEW_CANDIDATES = 256
MAX_CANDIDATES = 4096
SAMPLE = 128  # photos of the library that an image is compared with
SORTS = ("relevance", "date")
Embed = Callable[[Sequence[str]], NDArray[np.float32]]
MATCH_COLUMNS = "root, path, taken, camera, latitude, longitude, width, height, size, hash, look"


@dataclass
class _Part:
    """One text or image of a query.

    Attributes:
        vector: Unit vector (E,).
        others: Sets of vectors (M, E) among which it must stand out: texts, or other photos.
        mean, spread: Of its scores over the library.
    """

    vector: NDArray[np.float32]
    others: list[NDArray[np.float32]]
    mean: float = 0.0
    spread: float = 1.0

    def z(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """How much photos (N, E) stand out: z-scores (N,)."""
        scores = rows @ self.vector
        z: NDArray[np.float32] = ((scores - self.mean) / self.spread).astype(np.float32)
        others = [relevance.among_others(scores, rows, vectors) for vectors in self.others]
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
        vectors: Its vectors.
        embed: Returns the vectors of texts.
        query: Texts, images and filters.
        k: This and the others as for `Library.search`.
        sort: "relevance" or "date".
        dedupe: Leave out near duplicates.
        everything: Return the k nearest.

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
    unwanted = _text_parts(query.without, embed)
    photos = int(live.sum())
    allowed = _filtered(store, query, live)
    if not wanted:
        if unwanted:
            raise DataError("say what to look for as well as what not to")
        return _by_filters(store, query, allowed, k, photos)
    rough = _scan(vectors, wanted, unwanted, live)
    calibrated = photos >= relevance.MIN_PHOTOS and not everything
    size = max(FEW_CANDIDATES, 4 * k)
    while True:
        slots = _best(rough, allowed, size)
        rows = vectors.rows(slots)
        z, order = _rank(rows, wanted, unwanted)
        count = len(order)
        if calibrated:
            count = relevance.count_relevant(z[order], int(allowed.sum()))
        # Where even the last candidate is relevant, there are more.
        if count < len(order) or not calibrated or size >= min(MAX_CANDIDATES, allowed.sum()):
            break
        size *= 4
    cosines = rows @ wanted[0].vector

    def matches(order: NDArray[np.intp]) -> list[Match]:
        return _matches(store, slots[order], z[order], cosines[order])

    nearest = matches(order[:1]) if not count else []
    order = order[:count]
    if dedupe:
        found = _distinct(matches(order), rows[order])
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
    vectors: Vectors, wanted: Sequence[_Part], unwanted: Sequence[_Part], live: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """Set the mean and the spread of each part; returns z-scores of all wanted ones (N,)."""
    parts = [*wanted, *unwanted]
    scores = vectors.scores(np.stack([part.vector for part in parts]))
    for part, row in zip(parts, scores, strict=True):
        part.mean, part.spread = relevance.among_photos(row[live]) if live.any() else (0.0, 1.0)
    z = [(row - part.mean) / part.spread for part, row in zip(wanted, scores, strict=False)]
    return z[0] if len(z) == 1 else np.minimum.reduce(z)


def _rank(
    rows: NDArray[np.float32], wanted: Sequence[_Part], unwanted: Sequence[_Part]
) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """z-scores of photos (N, E), and the order of those that may be shown, the best first."""
    z: NDArray[np.float32] = np.minimum.reduce([part.z(rows) for part in wanted])
    for part in unwanted:
        z[relevance.is_likely(part.z(rows))] = -np.inf
    order = np.argsort(-z, kind="stable")
    return z, order[np.isfinite(z[order])]


def _text_parts(texts: Sequence[str], embed: Embed) -> list[_Part]:
    parts = []
    for text in texts:
        if not text.strip():
            raise DataError("the query is empty; say what to look for")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise DataError("the query is not UTF-8 text")
        others = relevance.contrasts(text)
        rows = embed([text, *others, *relevance.COMMON])
        parts.append(_Part(rows[0], [rows[1 : 1 + len(others)], rows[1 + len(others) :]]))
    return parts


def _image_parts(
    store: Store,
    images: Sequence[str | os.PathLike[str]],
    vectors: Vectors,
    live: NDArray[np.bool_],
) -> list[_Part]:
    """Vectors of images: from the index if it has the same content, else by the model."""
    from .file_hash import file_hash

    parts, missing = [], []
    slots = np.flatnonzero(live)
    sample = vectors.rows(slots[:: -(-len(slots) // SAMPLE) or 1])
    for image in images:
        path = find_image(image)
        status = path.stat()
        digest = file_hash(os.fsencode(path), Stamp(status.st_size, status.st_mtime_ns))
        same = store.copy_of(digest) if digest else None
        if same is None:
            missing.append(os.fspath(image))
        else:
            row = vectors.rows([same[1]])[0]
            parts.append(_Part(row / np.linalg.norm(row), [sample]))
    if missing:
        model, processor = load_recorded(store, whole=True)
        rows = np.asarray(model.encode_image(processor.images(missing), normalize=True))
        parts += [_Part(row, [sample]) for row in rows.astype(np.float32)]
    return parts


def _filtered(store: Store, query: Query, live: NDArray[np.bool_]) -> NDArray[np.bool_]:
    slots = filter_slots(store, query)
    if slots is None:
        return live
    mask = np.zeros_like(live)
    mask[slots[slots < len(mask)]] = True
    return mask & live


def _best(z: NDArray[np.float32], allowed: NDArray[np.bool_], count: int) -> NDArray[np.intp]:
    """Slots of the best `count` among the allowed ones."""
    slots = np.flatnonzero(allowed)
    if count >= len(slots):
        return slots
    best: NDArray[np.intp] = slots[np.argpartition(-z[slots], count)[:count]]
    return best


def _by_filters(
    store: Store, query: Query, allowed: NDArray[np.bool_], k: int, photos: int
) -> SearchResults:
    """Without a text or an image: what the filters let pass, the latest first."""
    slots = np.flatnonzero(allowed)
    none = np.zeros(len(slots), np.float32)
    found = _matches(store, slots, none, none)
    found.sort(key=lambda match: match.taken or "", reverse=True)
    return SearchResults(query.name, found[:k], total=len(found), photos=photos, calibrated=False)


def _matches(
    store: Store, slots: NDArray[np.intp], z: NDArray[np.float32], cosines: NDArray[np.float32]
) -> list[Match]:
    roots = store.roots()
    found = []
    for slot, relevance_z, cosine in zip(slots.tolist(), z.tolist(), cosines.tolist(), strict=True):
        # A slot can be without a file only if another process has just dropped it.
        for row in store.rows(f"SELECT {MATCH_COLUMNS} FROM file WHERE slot=?", slot):
            root, path, *rest = row
            name = os.fsdecode(absolute(roots.get(root, b""), bytes(path)))
            found.append(Match(name, relevance_z, cosine, *rest))
    return found


def _distinct(matches: list[Match], rows: NDArray[np.float32]) -> list[Match]:
    """Matches without those that equal or look like a better one."""
    kept: list[int] = []
    for i, match in enumerate(matches):
        if not any(
            match.hash == matches[j].hash
            or (near(match.look, matches[j].look) and rows[i] @ rows[j] >= NEAR_COSINE)
            for j in kept
        ):
            kept.append(i)
    return [matches[i] for i in kept]
