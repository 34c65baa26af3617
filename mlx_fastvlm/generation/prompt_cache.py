"""Keys and values of earlier prompts, so that what a new one begins alike need not be computed."""

from dataclasses import dataclass
from threading import Lock

import mlx.core as mx

from mlx_mobileclip.caching.fingerprint import Weights

from ..models.fastvlm import IMAGE_TOKEN
from ..models.kv_cache import KVCache
from ..preprocess.processor import Picture

Sequence = list[int | str]  # ids; in the places of an image its key


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    sequence: Sequence
    bits: int | None
    layers: list[list[mx.array]]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for layer in self.layers for part in layer)


class PromptCache:
    """What a model's decoder made of its last prompts and answers.

    Give the same one to `generate` for each turn of a conversation, for several questions about
    an image, or for prompts that share a system prompt: the tokens that a prompt has in common
    with an earlier one, up to the first that differs, are not computed again. Logits are those of
    a whole prompt up to rounding, as products of other sizes are summed in another order.

    It serves one model at a time: it keeps the weights that filled it, and is emptied when it is
    used with any others. Any thread can use it.
    """

    def __init__(self, max_bytes: int = 512 << 20) -> None:
        """Begin empty.

        Args:
            max_bytes: Most that is held; a token takes 12 kB in the 0.5B model in float16, 28 kB
                in the 1.5B and 56 kB in the 7B. The prompts not used for longest make room.
        """
        self.max_bytes = max_bytes
        self._entries: list[_Entry] = []  # the last used at the end
        self._weights = Weights()
        self._lock = Lock()

    def fill(
        self, weights: Weights, sequence: Sequence, cache: list[KVCache], bits: int | None
    ) -> int:
        """Put what is known of a prompt into empty caches.

        Args:
            weights: Those of the model that the caches belong to.
            sequence: From `describe`.
            cache: One for each layer.
            bits: Those of the caches.

        Returns:
            How many of the first tokens they hold now; always less than all.
        """
        with self._lock:
            if not self._weights.same_as(weights):
                self._weights = weights
                self._entries.clear()
            alike = [entry for entry in reversed(self._entries) if entry.bits == bits]
            lengths = [_in_common(entry.sequence, sequence[:-1]) for entry in alike]
            length = max(lengths, default=0)
            if not length:
                return 0
            best = alike[lengths.index(length)]  # of several the last used
            self._entries.remove(best)
            self._entries.append(best)
        for layer, parts in zip(cache, best.layers, strict=True):
            layer.append([part[..., :length, :] for part in parts])
        return length

    def keep(
        self, weights: Weights, sequence: Sequence, cache: list[KVCache], bits: int | None
    ) -> None:
        """Hold on to the first tokens in the caches, as many as the sequence has."""
        entry = _Entry(sequence, bits, [layer.first(len(sequence)) for layer in cache])
        if entry.nbytes > self.max_bytes:
            return
        mx.eval(entry.layers)
        with self._lock:
            if not self._weights.same_as(weights):  # another model has used the cache since
                return
            self._entries = [old for old in self._entries if not _begins(old, entry)] + [entry]
            while sum(entry.nbytes for entry in self._entries) > self.max_bytes:
                del self._entries[0]


def _begins(old: _Entry, new: _Entry) -> bool:
    """Whether the new entry holds all that the old one does."""
    return old.bits == new.bits and new.sequence[: len(old.sequence)] == old.sequence


def describe(ids: list[int], pictures: list[Picture]) -> Sequence:
    """A prompt with each image's key in the places of its embeddings."""
    keys = (picture.key for picture in pictures for _ in range(picture.count))
    return [next(keys) if token == IMAGE_TOKEN else token for token in ids]


def _in_common(first: Sequence, second: Sequence) -> int:
    """Length of the longest common beginning."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
