"""Photos that look alike: a hash of the look, and groups of equal, near and similar photos."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 8
MAX_BITS = 4  # of 64 that differ between near duplicates, as after saving again or resizing
NEAR_COSINE = 0.9  # plain pictures have the same look; the model must agree
BAND_BITS = 13  # five bands: with four wrong bits at least one band is right
BLOCK = 2048  # rows compared at once


def look(image: Image.Image) -> int:
    """A 64-bit hash of an image's look: where brightness rises to the right, in 8 x 8 places.

    Source: the difference hash ("dHash") of Neal Krawetz, 2013. It is signed, as SQLite's integers.
    """
    small = image.convert("L").resize((SIDE + 1, SIDE), Image.Resampling.BOX)
    values = np.asarray(small, np.int16)
    bits = np.packbits(values[:, 1:] > values[:, :-1])
    return int.from_bytes(bits.tobytes(), "big", signed=True)


def differing_bits(a: int, b: int) -> int:
    """Number of bits in which two looks differ."""
    return ((a ^ b) & 0xFFFF_FFFF_FFFF_FFFF).bit_count()


def near(a: int | None, b: int | None) -> bool:
    """Whether two photos look nearly the same."""
    return a is not None and b is not None and differing_bits(a, b) <= MAX_BITS


def near_pairs(looks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Pairs of indices whose looks differ in at most MAX_BITS bits, by bands that are equal."""
    seen: set[tuple[int, int]] = set()
    for band in range(-(-64 // BAND_BITS)):
        same = defaultdict(list)
        for i, value in enumerate(looks):
            same[value >> band * BAND_BITS & (1 << BAND_BITS) - 1].append(i)
        for members in same.values():
            # Equal looks are linked in a chain, so that a thousand of them are not half a million.
            by_look = defaultdict(list)
            for i in members:
                by_look[looks[i]].append(i)
            for group in by_look.values():
                yield from pairwise(group) if band == 0 else ()
            for a, b in combinations([group[0] for group in by_look.values()], 2):
                if (a, b) not in seen and differing_bits(looks[a], looks[b]) <= MAX_BITS:
                    seen.add((a, b))
                    yield a, b


def similar_pairs(
    rows: NDArray[np.float32], threshold: float, on_progress: Callable[[int], None] | None = None
) -> Iterator[tuple[int, int]]:
    """Pairs of indices of rows (N, E), unit rows, whose cosine similarity reaches a threshold."""
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        for other in range(start, len(rows), BLOCK):
            close = block @ rows[other : other + BLOCK].T >= threshold
            for i, j in np.argwhere(close):
                if start + i < other + j:
                    yield int(start + i), int(other + j)
        if on_progress:
            on_progress(len(block))


def groups(pairs: Iterable[tuple[int, int]], count: int) -> list[list[int]]:
    """Connected groups of at least two of `count` indices, each in order."""
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
