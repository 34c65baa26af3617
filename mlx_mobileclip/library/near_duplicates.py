"""Find near duplicates by perceptual hash, and similar photos by embedding."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 8
MAX_DISTANCE = 4  # Hamming distance of near duplicates, such as re-encoded or resized copies
NEAR_COSINE = 0.9  # hashes of plain pictures collide, so embeddings must agree
BAND_BITS = 13  # five bands: if at most four bits differ, one band is equal
BLOCK = 2048  # rows per comparison


def difference_hash(image: Image.Image) -> int:
    """64-bit perceptual hash: whether brightness rises to the right, at 8 x 8 positions.

    Source: difference hash ("dHash"), Neal Krawetz, 2013. Signed, like SQLite integers.
    """
    small = image.convert("L").resize((SIDE + 1, SIDE), Image.Resampling.BOX)
    values = np.asarray(small, np.int16)
    bits = np.packbits(values[:, 1:] > values[:, :-1])
    return int.from_bytes(bits.tobytes(), "big", signed=True)


def hamming_distance(a: int, b: int) -> int:
    """Number of bits in which two 64-bit hashes differ."""
    return ((a ^ b) & 0xFFFF_FFFF_FFFF_FFFF).bit_count()


def hashes_match(a: int | None, b: int | None) -> bool:
    """Whether two perceptual hashes are close."""
    return a is not None and b is not None and hamming_distance(a, b) <= MAX_DISTANCE


def near_pairs(hashes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Index pairs within MAX_DISTANCE bits, found among hashes that share a band."""
    seen: set[tuple[int, int]] = set()
    for band in range(-(-64 // BAND_BITS)):
        buckets = defaultdict(list)
        for i, value in enumerate(hashes):
            buckets[value >> band * BAND_BITS & (1 << BAND_BITS) - 1].append(i)
        for members in buckets.values():
            # Chain equal hashes: n - 1 pairs instead of n (n - 1) / 2.
            by_hash = defaultdict(list)
            for i in members:
                by_hash[hashes[i]].append(i)
            for group in by_hash.values():
                yield from pairwise(group) if band == 0 else ()
            for a, b in combinations([group[0] for group in by_hash.values()], 2):
                if (a, b) not in seen and hamming_distance(hashes[a], hashes[b]) <= MAX_DISTANCE:
                    seen.add((a, b))
                    yield a, b


def similar_pairs(
    rows: NDArray[np.float32], threshold: float, on_progress: Callable[[int], None] | None = None
) -> Iterator[tuple[int, int]]:
    """Index pairs of unit rows (N, E) with cosine similarity >= threshold."""
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        for other in range(start, len(rows), BLOCK):
            close = block @ rows[other : other + BLOCK].T >= threshold
            for i, j in np.argwhere(close):
                if start + i < other + j:
                    yield int(start + i), int(other + j)
        if on_progress:
            on_progress(len(block))


def connected_components(pairs: Iterable[tuple[int, int]], count: int) -> list[list[int]]:
    """Connected components with at least two of `count` indices, each sorted."""
    parent = list(range(count))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for a, b in pairs:
        parent[find(max(a, b))] = find(min(a, b))
    members = defaultdict(list)
    for i in range(count):
        members[find(i)].append(i)
    return [group for group in members.values() if len(group) > 1]
