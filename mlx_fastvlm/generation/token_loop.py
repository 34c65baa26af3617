"""Token after token: the decoder, its KV cache and the sampler at work on one answer."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from mlx_mobileclip.errors import ModelError

from ..models.fastvlm import FastVLM
from ..models.kv_cache import KVCache
from .sampling import UNDECIDED, Sampler

NOT_FINITE = -1  # instead of a token, when the logits have overflowed


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token on its way, a scalar, and what it takes to draw it again."""

    token: mx.array
    logits: mx.array
    state: list[mx.array]  # of the sampler, before the draw


class Decoder:
    """The decoder as it writes one answer."""

    def __init__(self, model: FastVLM, cache: list[KVCache], sampler: Sampler, known: int):
        """Go on from what the cache holds; ids from `known` on stand for nothing."""
        self._model, self._cache, self._sampler, self._known = model, cache, sampler, known

    def queue(self, ids: mx.array, embeddings: mx.array | None = None) -> Drawn:
        """Begin to compute the token after these ids, (1, L)."""
        logits = self._model(ids, self._cache, embeddings, last_only=True)[0, -1, : self._known]
        self._dtype = logits.dtype
        return self._draw(logits.astype(mx.float32))

    def _draw(self, logits: mx.array) -> Drawn:
        state = self._sampler.state
        # One bad logit makes the sum bad.
        token = mx.where(mx.isfinite(mx.sum(logits)), self._sampler(logits), NOT_FINITE)
        mx.async_eval(token, self._sampler.state)
        return Drawn(token, logits, state)

    def tokens(self, drawn: Drawn, max_tokens: int) -> Iterator[int]:
        """Token after token; each step is queued before the token of the last one is read."""
        count = 1
        while True:
            following = None
            if count < max_tokens:
                following = self.queue(mx.maximum(drawn.token, 0).reshape(1, 1))
            value = cast(int, drawn.token.item())
            if value == UNDECIDED:
                if following is not None:
                    for layer in self._cache:
                        layer.trim(1)
                self._sampler.thorough, self._sampler.state = True, drawn.state
                drawn = self._draw(drawn.logits)
                continue
            if value == NOT_FINITE:
                wider = "" if self._dtype == mx.float32 else "try --dtype float32, or "
                raise ModelError(
                    f"the decoder's logits are not finite; {wider}get the checkpoint again"
                )
            yield value
            if following is None:
                return
            drawn, count = following, count + 1
