"""The key/value cache of one attention layer, with the protocol of mlx-lm's caches."""

from typing import Any

import mlx.core as mx

from mlx_mobileclip.device import reserves_memory

STEP = 256


class KVCache:
    """Keys and values of all tokens so far, in buffers that grow in steps.

    It has the methods that mlx-lm 0.32 calls on KVCache of its `models/cache.py`, so either can
    replace the other.
    """

    def __init__(self, capacity: int = STEP) -> None:
        """Create an empty cache.

        Args:
            capacity: Number of tokens to allocate at the first update, so that none is copied
                later. On a GPU each update copies the buffers while the one before is computed,
                with all that they reserve, so they only grow in steps there.
        """
        self.offset = 0
        self._capacity = capacity if reserves_memory() else 0
        self._buffers: list[mx.array] = []  # keys and values, or the six parts of quantised ones

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append the keys and values of new tokens and return those of all tokens.

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
        """Append new tokens, one array (B, K, L, ...) for each buffer."""
        start, self.offset = self.offset, self.offset + parts[0].shape[2]
        old: list[mx.array | None] = [*self._buffers] or [None] * len(parts)
        self._buffers = [self._reserve(b, p, start) for b, p in zip(old, parts, strict=True)]
        for buffer, part in zip(self._buffers, parts, strict=True):
            buffer[..., start : self.offset, :] = part

    def first(self, length: int) -> list[mx.array]:
        """Return the first tokens of each buffer, unaffected by later changes."""
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
        """Attention mask for N new tokens: None for a single one, else causal."""
        if N == 1 and not return_array:
            return None
        if not return_array:
            return "causal"
        rows = mx.arange(self.offset, self.offset + N)
        return rows[:, None] >= mx.arange(self.offset + N)[None]

    @property
    def state(self) -> tuple[Any, ...]:
        """Buffers and offset, to be evaluated or saved."""
        return (*self._buffers, self.offset)

    @state.setter
    def state(self, value: tuple[Any, ...]) -> None:
        *self._buffers, self.offset = value

    def is_trimmable(self) -> bool:
        """Whether tokens can be dropped from the end."""
        return True

    def trim(self, n: int) -> int:
        """Drop the last n tokens and return the number dropped."""
        n = min(n, self.offset)
        self.offset -= n
        return n

    def size(self) -> int:
        """Number of tokens held."""
        return self.offset

    def empty(self) -> bool:
        """Whether nothing has been stored yet."""
        return not self._buffers

    @property
    def nbytes(self) -> int:
        """Size of the buffers in bytes, unused capacity included."""
        return sum(buffer.nbytes for buffer in self._buffers)


class QuantizedKVCache(KVCache):
    """A cache that stores keys and values in 8 or 4 bits and returns them as floats."""

    def __init__(self, capacity: int, bits: int, group_size: int) -> None:
        """Create an empty cache.

        Args:
            capacity: Number of tokens to allocate at the first update.
            bits: 8 or 4.
            group_size: Values that share a scale: 32 or 64, a divisor of the head width.
        """
        super().__init__(capacity)
        self._bits, self._group_size = bits, group_size

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append the keys and values of new tokens and return those of all, dequantised."""
        both = (mx.quantize(x, self._group_size, self._bits) for x in (keys, values))
        self.append([part for quantized in both for part in quantized])
        return self._dequantized(self._buffers[:3]), self._dequantized(self._buffers[3:])

    def _dequantized(self, buffers: list[mx.array]) -> mx.array:
        weight, scales, biases = (buffer[..., : self.offset, :] for buffer in buffers)
        return mx.dequantize(weight, scales, biases, self._group_size, self._bits)
