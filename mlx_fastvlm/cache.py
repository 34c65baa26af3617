"""The key/value cache of one attention layer, with the protocol of mlx-lm's caches."""

from typing import Any

import mlx.core as mx

STEP = 256


class KVCache:
    """Keys and values of all tokens so far, in buffers that grow by whole steps.

    The methods are those that mlx-lm 0.32 `models/cache.py` calls on its own KVCache, so either
    can stand in for the other.
    """

    def __init__(self, capacity: int = STEP) -> None:
        """Reserve room for `capacity` tokens at the first update, so that none is copied later."""
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.offset = 0
        self._capacity = capacity

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values of new tokens and return those of all.

        Args:
            keys: (B, K, L, D) with K key/value heads.
            values: the same shape.

        Returns:
            Keys and values, (B, K, offset + L, D).
        """
        start, self.offset = self.offset, self.offset + keys.shape[2]
        self.keys = self._reserve(self.keys, keys, start)
        self.values = self._reserve(self.values, values, start)
        self.keys[..., start : self.offset, :] = keys
        self.values[..., start : self.offset, :] = values
        return self.keys[..., : self.offset, :], self.values[..., : self.offset, :]

    def _reserve(self, buffer: mx.array | None, new: mx.array, start: int) -> mx.array:
        if buffer is not None and self.offset <= buffer.shape[2]:
            return buffer
        B, K, _, D = new.shape
        rows = -(-max(self.offset, self._capacity) // STEP) * STEP
        fresh = mx.zeros((B, K, rows - (start if buffer is not None else 0), D), new.dtype)
        return fresh if buffer is None else mx.concatenate([buffer[..., :start, :], fresh], axis=2)

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """The attention mask for N new tokens: None for one, else causal."""
        if N == 1 and not return_array:
            return None
        if not return_array:
            return "causal"
        rows = mx.arange(self.offset, self.offset + N)
        return rows[:, None] >= mx.arange(self.offset + N)[None]

    @property
    def state(self) -> tuple[Any, ...]:
        """What must be evaluated, or saved, to keep the cache."""
        return self.keys, self.values, self.offset

    @state.setter
    def state(self, value: tuple[Any, ...]) -> None:
        self.keys, self.values, self.offset = value

    def is_trimmable(self) -> bool:
        """Whether tokens can be dropped from the end."""
        return True

    def trim(self, n: int) -> int:
        """Forget the last n tokens; returns how many there were to forget."""
        n = min(n, self.offset)
        self.offset -= n
        return n

    def size(self) -> int:
        """Tokens held."""
        return self.offset

    def empty(self) -> bool:
        """Whether nothing has been stored yet."""
        return self.keys is None

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, reserve included."""
        return 0 if self.keys is None or self.values is None else 2 * self.keys.nbytes


class QuantizedKVCache(KVCache):
    """A cache that keeps keys and values in 8 or 4 bits, and gives them back as floats."""

    def __init__(self, capacity: int, bits: int, group_size: int) -> None:
        """Reserve room for `capacity` tokens.

        Args:
            capacity: Tokens.
            bits: 8 or 4.
            group_size: Values of one head that share a scale: 32 or 64, a divisor of its width.
        """
        super().__init__(capacity)
        self._bits, self._group_size = bits, group_size
        self._buffers: list[mx.array] = []

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values of new tokens and return those of all, as rounded."""
        start, self.offset = self.offset, self.offset + keys.shape[2]
        new = [
            part for x in (keys, values) for part in mx.quantize(x, self._group_size, self._bits)
        ]
        old: list[mx.array | None] = [*self._buffers] or [None] * len(new)
        self._buffers = [self._reserve(b, n, start) for b, n in zip(old, new, strict=True)]
        for buffer, added in zip(self._buffers, new, strict=True):
            buffer[..., start : self.offset, :] = added
        return self._unpacked(self._buffers[:3]), self._unpacked(self._buffers[3:])

    def _unpacked(self, buffers: list[mx.array]) -> mx.array:
        weight, scales, biases = (buffer[..., : self.offset, :] for buffer in buffers)
        return mx.dequantize(weight, scales, biases, self._group_size, self._bits)

    @property
    def state(self) -> tuple[Any, ...]:
        """What must be evaluated, or saved, to keep the cache."""
        return (*self._buffers, self.offset)

    @state.setter
    def state(self, value: tuple[Any, ...]) -> None:
        *self._buffers, self.offset = value

    def empty(self) -> bool:
        """Whether nothing has been stored yet."""
        return not self._buffers

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, reserve included."""
        return sum(buffer.nbytes for buffer in self._buffers)
