"""Batched decode loop: one forward pass gives each answer its next token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import numpy as np

from mlx_mobileclip.errors import ModelError

from ..models.fastvlm import FastVLM
from ..models.kv_cache import KVCache
from .answer import LogProbabilities
from .batch_cache import BatchKVCache
from .sampling import UNDECIDED
from .token_loop import Decoder, PendingToken


@dataclass(frozen=True, slots=True)
class NextToken:
    """The next token of a row, or its error.

    Attributes:
        token: Token id; -1 with an error.
        is_complete: Whether a constraint allows no more tokens.
        logprobs: Log-probabilities of the token and of the most likely ones, if requested.
        error: Why the row cannot continue.
    """

    token: int
    is_complete: bool = False
    logprobs: LogProbabilities | None = None
    error: ModelError | None = None


@dataclass(slots=True)
class _Row:
    decoder: Decoder
    pending: PendingToken | None  # None after the last token
    remaining: int  # tokens, including the pending one

    def read(self) -> int:
        """Wait for the pending token."""
        assert self.pending is not None, "a row was stepped after its end"
        return cast(int, self.pending.token.item())

    def accept(self, value: int) -> NextToken:
        """Add the token that was read to the answer."""
        assert self.pending is not None
        try:
            self.decoder.accept(value)
            is_complete = self.decoder.is_complete
        except ModelError as error:
            return NextToken(-1, error=error)
        return NextToken(value, is_complete, _read_logprobs(self.pending.logprobs))


class BatchDecoder:
    """Runs the decoder for several answers, each a row with its own sampler."""

    def __init__(self, model: FastVLM):
        """Create a decoder without rows."""
        self._model = model
        self._cache = [BatchKVCache() for _ in model.layers]
        self._rows: list[_Row] = []

    def add(self, decoder: Decoder, first: PendingToken, max_tokens: int) -> None:
        """Append the answer as a row, after its prefill."""
        for layer, single in zip(self._cache, decoder.cache, strict=True):
            layer.add(single)
        decoder.cache = []  # now in the batch
        self._rows.append(_Row(decoder, first, max_tokens))

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these, in ascending order."""
        self._rows = [self._rows[row] for row in rows]
        for layer in self._cache:
            layer.keep(rows)
        mx.async_eval([layer.buffers for layer in self._cache])  # another thread may step next

    def cache_of(self, row: int) -> list[KVCache]:
        """Return the KV cache of each layer for one row."""
        return [layer.row(row) for layer in self._cache]

    @property
    def nbytes(self) -> int:
        """Size of the KV caches in bytes."""
        return sum(layer.nbytes for layer in self._cache)

    def step(self) -> list[NextToken]:
        """Return the next token of each row; the pass after it is queued before it is read.

        The caller must drop a row after its last token, an error, or when it is complete.
        """
        rows = self._rows
        while True:
            logits = self._queue_pass()
            following = [
                None if x is None or row.decoder.waits else row.decoder.sample(x)
                for row, x in zip(rows, logits, strict=True)
            ]
            self._start(following, logits)
            values = [row.read() for row in rows]
            if UNDECIDED not in values:
                break
            self._sample_again(values, following)
        tokens = [row.accept(value) for row, value in zip(rows, values, strict=True)]
        for i, (row, x) in enumerate(zip(rows, logits, strict=True)):
            row.remaining -= 1
            if x is None or not row.decoder.waits or tokens[i].is_complete or tokens[i].error:
                continue
            try:
                following[i] = row.decoder.sample(x)
            except ModelError as error:
                tokens[i] = NextToken(-1, error=error)
        self._start(following)
        for row, pending in zip(rows, following, strict=True):
            row.pending = pending
        return tokens

    def _queue_pass(self) -> Sequence[mx.array | None]:
        """Return logits (V,) after each row's pending token, or None if no row needs them."""
        rows = self._rows
        if all(row.remaining == 1 for row in rows):
            return [None] * len(rows)
        inputs = mx.stack([row.pending.token for row in rows if row.pending is not None])
        inputs = mx.maximum(inputs, 0)[:, None]
        logits = self._model(inputs, self._cache, last_only=True)
        return list(logits[:, -1, : rows[0].decoder.vocab_size].astype(mx.float32))

    def _start(
        self, following: list[PendingToken | None], logits: Sequence[mx.array | None] = ()
    ) -> None:
        """Start computing tokens, sampler states, log-probabilities and logits."""
        arrays = [[p.token, p.logprobs] for p in following if p is not None]
        states = [row.decoder.sampler.state for row in self._rows]
        mx.async_eval(arrays, states, [x for x in logits if x is not None])

    def _sample_again(self, values: list[int], following: list[PendingToken | None]) -> None:
        """Resample UNDECIDED tokens, and undo the pass that was queued after them."""
        for layer in self._cache if any(p is not None for p in following) else ():
            layer.trim(1)
        for row, value, ahead in zip(self._rows, values, following, strict=True):
            if ahead is not None:
                row.decoder.sampler.state = ahead.state
            if value == UNDECIDED and row.pending is not None:
                row.pending = row.decoder.sample_again(row.pending)


def _read_logprobs(arrays: list[mx.array]) -> LogProbabilities | None:
    if not arrays:
        return None
    token, ids, values = (np.array(array) for array in arrays)
    return float(token), tuple(zip(ids.tolist(), values.tolist(), strict=True))
