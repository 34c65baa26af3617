"""A cache of keys and values, so that the common prefix of prompts is computed once."""

from dataclasses import dataclass
from threading import Lock

import mlx.core as mx

from mlx_mobileclip.caching.fingerprint import Weights

from ..models.fastvlm import IMAGE_TOKEN
from ..models.kv_cache import KVCache
from ..preprocess.processor import Picture

CachedSequence = list[int | str]  # token ids, with an image's key for each of its embeddings


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    sequence: CachedSequence
    bits: int | None
    layers: list[list[mx.array]]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for layer in self.layers for part in layer)


class PromptCache:
    """Cache of the attention keys and values of recent prompts and answers.

    Pass the same cache to `generate` for the turns of a conversation, for several questions about
    an image, or for prompts that share a system prompt: the longest prefix that a prompt shares
    with an earlier one is not computed again. Logits equal those of the whole prompt up to
    rounding, since products of other sizes are summed in another order.

    It serves one model at a time and is emptied when used with other weights. It is thread-safe.
    """

    def __init__(self, max_bytes: int = 512 << 20) -> None:
        """Create an empty cache.

        Args:
            max_bytes: Limit on memory; a token takes 12 kB in the 0.5B model in float16, 28 kB in
                the 1.5B and 56 kB in the 7B. The least recently used prompts are dropped.
        """
        self.max_bytes = max_bytes
        self._entries: list[_Entry] = []  # the most recently used last
        self._weights = Weights()
        self._lock = Lock()

    def fill(
        self, weights: Weights, sequence: CachedSequence, cache: list[KVCache], bits: int | None
    ) -> int:
        """Fill empty KV caches with the longest known prefix of a prompt.

        Args:
            weights: Weights of the model.
            sequence: The prompt, from `to_sequence`.
            cache: KV cache of each layer.
            bits: Bits of the KV caches; None for floats.

        Returns:
            Number of tokens filled in, always less than the prompt's.
        """
        with self._lock:
            if not self._weights.same_as(weights):
                self._weights = weights
                self._entries.clear()
            candidates = [entry for entry in reversed(self._entries) if entry.bits == bits]
            lengths = [_common_length(entry.sequence, sequence[:-1]) for entry in candidates]
            length = max(lengths, default=0)
            if not length:
                return 0
            best = candidates[lengths.index(length)]  # the most recently used of the longest
            self._entries.remove(best)
            self._entries.append(best)
        for layer, parts in zip(cache, best.layers, strict=True):
            layer.append([part[..., :length, :] for part in parts])
        return length

    def keep(
        self, weights: Weights, sequence: CachedSequence, cache: list[KVCache], bits: int | None
    ) -> None:
        """Store the first tokens of the KV caches, as many as the sequence has."""
        entry = _Entry(sequence, bits, [layer.first(len(sequence)) for layer in cache])
        if entry.nbytes > self.max_bytes:
            return
        mx.eval(entry.layers)
        with self._lock:
            if not self._weights.same_as(weights):  # another model has used the cache since
                return
            self._entries = [old for old in self._entries if not _is_prefix(old, entry)] + [entry]
            while sum(entry.nbytes for entry in self._entries) > self.max_bytes:
                del self._entries[0]


def _is_prefix(old: _Entry, new: _Entry) -> bool:
    """Whether the old entry is a prefix of the new one."""
    return old.bits == new.bits and new.sequence[: len(old.sequence)] == old.sequence


def to_sequence(ids: list[int], pictures: list[Picture]) -> CachedSequence:
    """Replace each IMAGE_TOKEN of a prompt by the key of its image."""
    keys = (picture.key for picture in pictures for _ in range(picture.count))
    return [next(keys) if token == IMAGE_TOKEN else token for token in ids]


def _common_length(first: CachedSequence, second: CachedSequence) -> int:
    """Length of the longest common prefix."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
