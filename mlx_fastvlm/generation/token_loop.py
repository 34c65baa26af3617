"""The decode loop of one answer: decoder, KV cache and sampler."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from mlx_mobileclip.errors import ModelError

from ..models.fastvlm import FastVLM
from ..models.kv_cache import KVCache
from ..models.sharding import from_first_rank
from .sampling import UNDECIDED, Sampler

NOT_FINITE = -1  # instead of a token, when the logits have overflowed


@dataclass(frozen=True, slots=True)
class PendingToken:
    """A token being computed, a scalar, and what is needed to sample it again."""

    token: mx.array
    logits: mx.array
    state: list[mx.array]  # of the sampler, before this token


class Decoder:
    """Runs the decoder for one answer."""

    def __init__(self, model: FastVLM, cache: list[KVCache], sampler: Sampler, vocab_size: int):
        """Continue from the cache; only ids below `vocab_size` are sampled."""
        self._model, self._cache, self._sampler = model, cache, sampler
        self._vocab_size = vocab_size

    def queue(self, ids: mx.array, embeddings: mx.array | None = None) -> PendingToken:
        """Start to compute the token after ids (1, L)."""
        return self._sample(self._logits(ids, embeddings))

    def _logits(self, ids: mx.array, embeddings: mx.array | None = None) -> mx.array:
        logits = self._model(ids, self._cache, embeddings, last_only=True)
        self._dtype = logits.dtype
        return logits[0, -1, : self._vocab_size].astype(mx.float32)

    def _sample(self, logits: mx.array) -> PendingToken:
        state = self._sampler.state
        # The sum is finite only if every logit is.
        token = mx.where(mx.isfinite(mx.sum(logits)), self._sampler(logits), NOT_FINITE)
        token = from_first_rank(token, self._model._group)
        mx.async_eval(token, self._sampler.state)
        return PendingToken(token, logits, state)

    def tokens(self, pending: PendingToken, max_tokens: int) -> Iterator[int]:
        """Yield tokens; each step is queued before the previous token is read."""
        count = 1
        while True:
            following = None
            if count < max_tokens:
                following = self.queue(mx.maximum(pending.token, 0).reshape(1, 1))
            value = cast(int, pending.token.item())
            if value == UNDECIDED:
                pending = self._sample_again(pending, trim=int(following is not None))
                continue
            self._check_finite(value)
            yield value
            if following is None:
                return
            pending, count = following, count + 1

    def _sample_again(self, pending: PendingToken, trim: int) -> PendingToken:
        """Sample an UNDECIDED token anew, and drop the passes queued after it from the cache."""
        for layer in self._cache:
            layer.trim(trim)
        self._sampler.full_sort, self._sampler.state = True, pending.state
        return self._sample(pending.logits)

    def _check_finite(self, value: int) -> None:
        if value == NOT_FINITE:
            wider = "" if self._dtype == mx.float32 else "try --dtype float32, or "
            raise ModelError(
                f"the decoder's logits are not finite; {wider}download the checkpoint again"
            )
