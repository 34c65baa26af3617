"""Decide which photos are relevant, calibrated for each query and library.

Cosine similarities are not comparable across models, queries and libraries. So two z-scores are
computed: of the photo's score among all photos, and of the query's score on that photo among
contrasting queries. For a text these are common words and the text with one word replaced ("a blue
car" for "a red car"); for an image they are photos of the library. Stouffer's method combines both
into one z-score. The Benjamini-Hochberg procedure then gives the number of significant photos,
with a bound on the share of false discoveries.
"""

from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

SIGNIFICANCE = 0.01  # false discovery rate, and significance level of a single photo
MIN_PHOTOS = 30  # fewer give unreliable statistics
# A word is replaced by the others of its group. Everyday words, not tuned on any model.
WORD_GROUPS = (
    ("red orange yellow green blue purple pink brown black white grey"),
    ("one two three four five six"),
    ("small medium large tiny huge"),
    ("left right top bottom middle"),
    # Subjects and shapes.
    "person dog cat bird horse flower tree mountain beach river sky street house car train "
    "boat table food cup book phone picture circle square triangle star cross heart",
)
GROUPS = tuple(words.split() for words in WORD_GROUPS)
COMMON_TEXTS = tuple(f"a {word}" for group in (GROUPS[0], GROUPS[4]) for word in group)
SUFFIXES = ("", "s", "es")
MAX_CONTRASTS = 96


def contrast_texts(text: str) -> list[str]:
    """All texts that differ in one word of WORD_GROUPS; COMMON_TEXTS if there are none."""
    words = text.split()
    texts = []
    for i, word in enumerate(words):
        for group in GROUPS:
            suffix = next(
                (s for s in SUFFIXES if word.endswith(s) and word.lower().removesuffix(s) in group),
                None,
            )
            if suffix is not None:
                stem = word.lower().removesuffix(suffix)
                others = [other + suffix for other in group if other != stem]
                texts += [" ".join([*words[:i], other, *words[i + 1 :]]) for other in others]
                break
    step = -(-len(texts) // MAX_CONTRASTS) or 1  # subsample for long texts
    return texts[::step] or list(COMMON_TEXTS)


def score_statistics(scores: NDArray[np.float32]) -> tuple[float, float]:
    """Mean and standard deviation of a query's scores (N,) over a library."""
    return float(scores.mean(dtype=np.float64)), max(float(scores.std(dtype=np.float64)), 1e-6)


def contrast_z_scores(
    scores: NDArray[np.float32], rows: NDArray[np.float32], contrasts: NDArray[np.float32]
) -> NDArray[np.float32]:
    """z-scores (N,) of scores (N,) on photos (N, E) among those of contrasting vectors (M, E)."""
    others = rows @ contrasts.T
    std = np.maximum(others.std(axis=1), 1e-6)
    result: NDArray[np.float32] = (scores - others.mean(axis=1)) / std
    return result


def combine(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float32]:
    """Combine two z-scores by Stouffer's method."""
    result: NDArray[np.float32] = (first + second) / np.float32(2**0.5)
    return result


def count_relevant(z: NDArray[np.float32], photos: int) -> int:
    """Number of significant z-scores, sorted in descending order, among `photos` photos.

    Source: Benjamini and Hochberg, "Controlling the false discovery rate", 1995.
    """
    normal = NormalDist()
    count = 0
    for i, value in enumerate(z.tolist(), 1):
        if normal.cdf(-value) <= SIGNIFICANCE * i / photos:
            count = i
    return count


def is_significant(z: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Whether each photo is significant by itself; used for excluded texts."""
    result: NDArray[np.bool_] = z > NormalDist().inv_cdf(1 - SIGNIFICANCE)
    return result
