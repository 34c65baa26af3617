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
        self.offset = 0
        self._capacity = capacity
        self._buffers: list[mx.array] = []  # one for each part that tokens are stored in

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values of new tokens and return those of all.

        Args:
            keys: (B, K, L, D) with K key/value heads.
            values: the same shape.

        Returns:
            Keys and values, (B, K, offset + L, D).
        """
        self.append([keys, values])
        keys, values = (buffer[..., : self.offset, :] for buffer in self._buffers)
        return keys, values

    def append(self, parts: list[mx.array]) -> None:
        """Append tokens in the parts they are stored in, (B, K, L, ...) each."""
        start, self.offset = self.offset, self.offset + parts[0].shape[2]
        old: list[mx.array | None] = [*self._buffers] or [None] * len(parts)
        self._buffers = [self._reserve(b, p, start) for b, p in zip(old, parts, strict=True)]
        for buffer, part in zip(self._buffers, parts, strict=True):
            buffer[..., start : self.offset, :] = part

    def first(self, length: int) -> list[mx.array]:
        """The parts of the first tokens, for `append`; later changes do not reach them."""
        return [mx.contiguous(buffer[..., :length, :]) for buffer in self._buffers]

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
        return (*self._buffers, self.offset)

    @state.setter
    def state(self, value: tuple[Any, ...]) -> None:
        *self._buffers, self.offset = value

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
        return not self._buffers

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, reserve included."""
        return sum(buffer.nbytes for buffer in self._buffers)


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

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values of new tokens and return those of all, as rounded."""
        both = (mx.quantize(x, self._group_size, self._bits) for x in (keys, values))
        self.append([part for packed in both for part in packed])
        return self._unpacked(self._buffers[:3]), self._unpacked(self._buffers[3:])

    def _unpacked(self, buffers: list[mx.array]) -> mx.array:
        weight, scales, biases = (buffer[..., : self.offset, :] for buffer in buffers)
        return mx.dequantize(weight, scales, biases, self._group_size, self._bits)
