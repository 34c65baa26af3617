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

NOT_FINITE = -1  # in place of a token if the logits have overflowed


@dataclass(frozen=True, slots=True)
class PendingToken:
    """A token being computed, a scalar, and what is needed to sample it again."""

    token: mx.array
    logits: mx.array
    state: list[mx.array]  # of the sampler, before this token
    logprobs: list[mx.array]  # token's value, top ids, top values; empty if not requested


class Decoder:
    """Runs the decoder for one answer.

    Attributes:
        cache: KV cache of each layer.
        sampler: Samples the tokens.
        waits: Whether a token must be read and accepted before the next one is sampled.
    """

    waits = False

    def __init__(
        self,
        model: FastVLM,
        cache: list[KVCache],
        sampler: Sampler,
        vocab_size: int,
        logprobs: int | None = None,
    ):
        """Continue from the cache; only ids below `vocab_size` are sampled.

        Args:
            model: The model.
            cache: KV cache of each layer.
            sampler: Samples the tokens.
            vocab_size: Number of ids of the tokenizer.
            logprobs: If given, also compute the log-probability of each token, and of this many
                of the most likely.
        """
        self._model, self.cache, self.sampler = model, cache, sampler
        self.vocab_size, self._logprobs = vocab_size, logprobs

    @property
    def is_complete(self) -> bool:
        """Whether no more tokens are allowed after those accepted."""
        return False

    def queue(self, ids: mx.array, embeddings: mx.array | None = None) -> PendingToken:
        """Start computing the token after ids (1, L)."""
        return self._start(self._logits(ids, embeddings))

    def _logits(self, ids: mx.array, embeddings: mx.array | None = None) -> mx.array:
        logits = self._model(ids, self.cache, embeddings, last_only=True)
        self._dtype = logits.dtype
        return logits[0, -1, : self.vocab_size].astype(mx.float32)

    def _start(self, logits: mx.array) -> PendingToken:
        pending = self.sample(logits)
        mx.async_eval(pending.token, self.sampler.state, pending.logprobs)
        return pending

    def sample(self, logits: mx.array) -> PendingToken:
        """Sample from float32 logits (V,), without starting the computation."""
        state = self.sampler.state
        # The sum is finite only if every logit is.
        token = mx.where(mx.isfinite(mx.sum(logits)), self.sampler(logits), NOT_FINITE)
        token = from_first_rank(token, self._model._group)
        logprobs = [] if self._logprobs is None else _logprobs(logits, token, self._logprobs)
        return PendingToken(token, logits, state, logprobs)

    def sample_again(self, pending: PendingToken) -> PendingToken:
        """Resample an UNDECIDED token."""
        self.sampler.full_sort, self.sampler.state = True, pending.state
        return self.sample(pending.logits)

    def accept(self, value: int) -> None:
        """Check a token that has been read, and add it to the answer.

        Raises:
            ModelError: the logits are not finite, or a constraint is too complex.
        """
        if value == NOT_FINITE:
            wider = "" if self._dtype == mx.float32 else "try --dtype float32, or "
            raise ModelError(
                f"the decoder's logits are not finite; {wider}download the checkpoint again"
            )

    def tokens(self, pending: PendingToken, max_tokens: int) -> Iterator[int]:
        """Yield tokens; each step is queued before the previous token is read."""
        count = 1
        while True:
            following = None
            if count < max_tokens:
                following = self.queue(mx.maximum(pending.token, 0).reshape(1, 1))
            value = cast(int, pending.token.item())
            if value == UNDECIDED:
                pending = self._start_again(pending, trim=int(following is not None))
                continue
            self.accept(value)
            yield value
            if following is None:
                return
            pending, count = following, count + 1

    def _start_again(self, pending: PendingToken, trim: int) -> PendingToken:
        """Resample an UNDECIDED token, and drop the passes queued after it from the cache."""
        for layer in self.cache:
            layer.trim(trim)
        pending = self.sample_again(pending)
        mx.async_eval(pending.token, self.sampler.state, pending.logprobs)
        return pending


def _logprobs(logits: mx.array, token: mx.array, count: int) -> list[mx.array]:
    """Return the token's log-probability, the most likely ids, and their log-probabilities."""
    normalized = logits - mx.logsumexp(logits)
    count = min(count, logits.size)
    order = mx.argpartition(-normalized, max(0, count - 1))[:count]
    order = order[mx.argsort(-normalized[order])]
    return [normalized[mx.maximum(token, 0)], order, normalized[order]]
