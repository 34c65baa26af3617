"""KV cache of one attention layer for several sequences of different lengths."""

import mlx.core as mx

from ..models.kv_cache import STEP, KVCache


class BatchKVCache:
    """Keys and values of several sequences, padded on the left so that all end at one position.

    One write then adds a token to every row. Rows can be added and dropped at any time, and
    padding that no row needs is dropped. It has the methods of `KVCache` that a decoder calls.
    """

    def __init__(self) -> None:
        """Create a cache without rows."""
        self._starts: list[int] = []  # position of each row's first token
        self._end = 0
        self._buffers: list[mx.array] = []  # keys and values, (B, K, capacity, D)

    def add(self, cache: KVCache) -> None:
        """Append a copy of another cache as a row."""
        end = max(self._end, cache.offset)
        buffers = [_padded(part, end) for part in cache.first(cache.offset)]
        if self._starts:
            old = [_padded(buffer[..., : self._end, :], end) for buffer in self._buffers]
            buffers = [mx.concatenate([a, b]) for a, b in zip(old, buffers, strict=True)]
        self._starts = [start + end - self._end for start in self._starts] + [end - cache.offset]
        self._buffers, self._end = buffers, end

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows."""
        if not rows:
            self._starts, self._end, self._buffers = [], 0, []
            return
        starts, index = [self._starts[row] for row in rows], mx.array(rows, mx.int32)
        first, end = min(starts), self._end
        self._starts, self._end = [start - first for start in starts], end - first
        self._buffers = [_padded(b[index, :, first:end], end - first) for b in self._buffers]

    def row(self, index: int) -> KVCache:
        """Return one row as a single cache; it refers to slices of this one's buffers."""
        cache = KVCache()
        start = self._starts[index]
        parts = [buffer[index : index + 1, :, start : self._end] for buffer in self._buffers]
        cache.state = (*parts, self._end - start)
        return cache

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append the keys and values of a new token per row; return those of all tokens.

        Args:
            keys: (B, K, L, D) with K key/value heads.
            values: the same shape.

        Returns:
            Keys and values, (B, K, S, D), of which `make_mask` hides the padding.
        """
        start, self._end = self._end, self._end + keys.shape[2]
        for i, part in enumerate((keys, values)):
            if self._end > self._buffers[i].shape[2]:
                self._buffers[i] = _padded(self._buffers[i][..., :start, :], start)
            self._buffers[i][..., start : self._end, :] = part
        keys, values = (buffer[..., : self._end, :] for buffer in self._buffers)
        return keys, values

    @property
    def offset(self) -> mx.array:
        """Number of tokens of each row, (B,)."""
        return mx.array([self._end - start for start in self._starts], mx.int32)

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | None:
        """Attention mask for one new token per row, (B, 1, 1, S); None if nothing is padded."""
        if N != 1:
            raise ValueError("a batch is extended by one token at a time")
        if not any(self._starts):
            return None
        return (mx.arange(self._end + 1) >= mx.array(self._starts)[:, None])[:, None, None]

    def trim(self, n: int) -> int:
        """Drop the last n tokens of every row."""
        self._end -= n
        return n

    @property
    def buffers(self) -> list[mx.array]:
        """The key and value buffers."""
        return self._buffers

    @property
    def nbytes(self) -> int:
        """Size of the buffers in bytes, padding included."""
        return sum(buffer.nbytes for buffer in self._buffers)


def _padded(rows: mx.array, end: int) -> mx.array:
    """Pad (B, K, S, D) on the left to length `end`, with capacity for at least one more token."""
    capacity = (end // STEP + 1) * STEP
    return mx.pad(rows, [(0, 0), (0, 0), (end - rows.shape[2], capacity - end), (0, 0)])
