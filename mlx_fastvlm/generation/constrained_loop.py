"""Constrained decode loop of one answer.

The tokens allowed next depend on the previous token, so sampling waits until it is read. The
forward pass does not: it is queued before, and the mask is computed meanwhile.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, cast
from weakref import WeakKeyDictionary, ref

import mlx.core as mx
import numpy as np

from mlx_mobileclip.errors import PromptError

from ..preprocess.tokenizer import TURN_END, Tokenizer
from .constraints import Constraint
from .sampling import UNDECIDED, Sampler, Sampling
from .token_loop import Decoder, PendingToken

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# The eight bits of each byte of a token mask.
BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_vocabularies: "WeakKeyDictionary[Tokenizer, Future[LLTokenizer]]" = WeakKeyDictionary()
_lock = Lock()


def vocabulary(tokenizer: Tokenizer) -> "Future[LLTokenizer]":
    """Return llguidance's table of a vocabulary, built once in a thread; it takes seconds."""
    with _lock:
        if tokenizer not in _vocabularies:
            _vocabularies[tokenizer] = ThreadPoolExecutor(1).submit(_build, tokenizer)
        return _vocabularies[tokenizer]


def _build(tokenizer: Tokenizer) -> "LLTokenizer":
    from llguidance import LLTokenizer, TokenizerWrapper

    end_ids = sorted(tokenizer.stop_ids)
    return LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer)), tokenizer.size, end_ids)


class _Vocabulary:
    """Adapts the tokenizer to llguidance's interface."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = ref(tokenizer)  # weak, to avoid a reference cycle
        self.eos_token_id = tokenizer.added[TURN_END]
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.size)]
        names = {i: name.encode() for name, i in tokenizer.added.items() if not self.tokens[i]}
        self.special_token_ids = list(names)
        for i, name in names.items():
            self.tokens[i] = name

    def __call__(self, text: str) -> list[int]:
        """Encode text that the grammar forces, so that the answer has the usual tokens."""
        tokenizer = self._tokenizer()
        assert tokenizer is not None  # an answer in progress refers to it
        return tokenizer.encode(text)


class Matcher:
    """Tracks one answer, and computes which tokens are allowed next."""

    def __init__(self, constraint: Constraint, tokenizer: Tokenizer):
        """Begin an answer; the first mask waits for the vocabulary's table."""
        self._constraint, self._size = constraint, tokenizer.size
        self._vocabulary = vocabulary(tokenizer)
        self._table = mx.array(np.where(BITS, 0, -np.inf).astype(np.float32))

    @cached_property
    def _matcher(self) -> "LLMatcher":
        from .grammar_check import new_matcher

        return new_matcher(self._vocabulary.result(), self._constraint.grammar)

    def mask(self) -> mx.array:
        """Additive mask for the logits (V,): 0 for tokens that may follow, else -inf."""
        bits = self._matcher.compute_bitmask()
        self._check()  # after an error llguidance would allow an end token
        return self._table[mx.array(np.frombuffer(bits, np.uint8))].reshape(-1)[: self._size]

    def advance(self, token: int) -> None:
        """Add a token to the answer."""
        self._matcher.consume_token(token)
        self._check()

    @property
    def is_complete(self) -> bool:
        """Whether the answer has ended, or no more tokens are allowed."""
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            from .grammar_check import error_of

            raise PromptError(
                f"{self._constraint.name} is too complex: {error_of(self._matcher)}; simplify it"
            )


class ConstrainedSampler(Sampler):
    """Samples from the tokens that are allowed next."""

    def __init__(
        self, sampling: Sampling, vocab_size: int, prompt_ids: Iterable[int], matcher: Matcher
    ):
        """Create a sampler for the matcher's answer."""
        super().__init__(sampling, vocab_size, prompt_ids)
        self.matcher = matcher

    def __call__(self, logits: mx.array) -> mx.array:
        """Sample as `Sampler` does."""
        return super().__call__(logits + self.matcher.mask())


class ConstrainedDecoder(Decoder):
    """Runs the decoder for one constrained answer."""

    sampler: ConstrainedSampler
    waits = True

    @property
    def is_complete(self) -> bool:
        """Whether no more tokens are allowed after those accepted."""
        return self.sampler.matcher.is_complete

    def _start(self, logits: mx.array) -> PendingToken:
        mx.async_eval(logits)  # while the mask is computed
        return super()._start(logits)

    def accept(self, value: int) -> None:
        """Check a token that has been read, and add it to the answer."""
        super().accept(value)
        self.sampler.matcher.advance(value)

    def tokens(self, pending: PendingToken, max_tokens: int) -> Iterator[int]:
        """Yield tokens; the pass of each step is queued before the previous token is read."""
        count = 1
        while True:
            logits = None
            if count < max_tokens:
                logits = self._logits(mx.maximum(pending.token, 0).reshape(1, 1))
                mx.async_eval(logits)
            value = cast(int, pending.token.item())
            if value == UNDECIDED:
                pending = self._start_again(pending, trim=int(logits is not None))
                continue
            self.accept(value)
            if logits is None or self.is_complete:
                yield value
                return
            pending, count = self._start(logits), count + 1
            yield value
