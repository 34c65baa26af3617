"""Decide which photos show what is asked for: calibrated for each query on this very library.

A cosine similarity means little by itself: it depends on the model, the query and the library. So
two z-scores are taken: of the photo's score among all photos of the library, and of the query's
score on that photo among others. For a text these are common words, and the text with a word
exchanged ("a blue car" for "a red car"); for an image they are photos of the library. Both together
are a z-score again (Stouffer's method). Benjamini and Hochberg's procedure then says how many
photos stand out more than the best of as many unrelated photos would by chance.
"""

from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

SIGNIFICANCE = 0.01  # of the photos shown, the share expected by chance
MIN_PHOTOS = 30  # with fewer the mean and the spread of scores say too little
# One word of a group is exchanged for the others of it. Everyday words; no model was looked at.
WORDS = (
    ("red orange yellow green blue purple pink brown black white grey"),
    ("one two three four five six"),
    ("small medium large tiny huge"),
    ("left right top bottom middle"),
    # Subjects and shapes.
    "person dog cat bird horse flower tree mountain beach river sky street house car train "
    "boat table food cup book phone picture circle square triangle star cross heart",
)
GROUPS = tuple(words.split() for words in WORDS)
COMMON = tuple(f"a {word}" for group in (GROUPS[0], GROUPS[4]) for word in group)
ENDINGS = ("", "s", "es")
MAX_CONTRASTS = 96


def contrasts(text: str) -> list[str]:
    """The text with one word exchanged, in all ways; common words if none can be."""
    words = text.split()
    found = []
    for i, word in enumerate(words):
        for group in GROUPS:
            ending = next(
                (e for e in ENDINGS if word.endswith(e) and word.lower().removesuffix(e) in group),
                None,
            )
            if ending is not None:
                stem = word.lower().removesuffix(ending)
                others = [other + ending for other in group if other != stem]
                found += [" ".join([*words[:i], other, *words[i + 1 :]]) for other in others]
                break
    step = -(-len(found) // MAX_CONTRASTS) or 1  # of a long text every n-th
    return found[::step] or list(COMMON)


def among_photos(scores: NDArray[np.float32]) -> tuple[float, float]:
    """Mean and standard deviation of a query's scores over the photos of a library (N,)."""
    return float(scores.mean(dtype=np.float64)), max(float(scores.std(dtype=np.float64)), 1e-6)


def among_others(
    scores: NDArray[np.float32], rows: NDArray[np.float32], vectors: NDArray[np.float32]
) -> NDArray[np.float32]:
    """z-scores of a query's scores (N,) on photos (N, E) among those of other vectors (M, E)."""
    others = rows @ vectors.T
    spread = np.maximum(others.std(axis=1), 1e-6)
    result: NDArray[np.float32] = (scores - others.mean(axis=1)) / spread
    return result


def combine(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float32]:
    """Two z-scores as one."""
    result: NDArray[np.float32] = (first + second) / np.float32(2**0.5)
    return result


def count_relevant(z: NDArray[np.float32], photos: int) -> int:
    """How many of the best z-scores, sorted downwards, stand out among this many photos.

    Source: Benjamini and Hochberg, "Controlling the false discovery rate", 1995.
    """
    chance = NormalDist()
    count = 0
    for i, value in enumerate(z.tolist(), 1):
        if chance.cdf(-value) <= SIGNIFICANCE * i / photos:
            count = i
    return count


def is_likely(z: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Whether a single photo stands out by itself; for what must not be shown."""
    result: NDArray[np.bool_] = z > NormalDist().inv_cdf(1 - SIGNIFICANCE)
    return result
