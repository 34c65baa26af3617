"""Sample the next token from the logits of one position."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import mlx.core as mx

from mlx_mobileclip.errors import PromptError

UNDECIDED = -2  # instead of a token: set `full_sort`, restore the state and sample again
BLOCKS, BLOCK = 64, 64  # number and width of the blocks of logits that top-p sorts


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters. Filters apply in transformers' order, as listed.

    Attributes:
        repetition_penalty: Divides the positive logits of tokens already seen, multiplies the
            negative ones (arXiv:1909.05858); 1 is off.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Keep the k most likely tokens; 0 is off.
        top_p: Keep the fewest most likely tokens whose total probability reaches p; 1 is off.
        min_p: Keep tokens at least this likely, relative to the most likely; 0 is off.
        seed: Makes sampling repeatable; None takes a new one each time.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        bounds = (
            ("temperature", 0, 100),
            ("top_k", 0, 1 << 30),
            ("top_p", 0, 1),
            ("min_p", 0, 1),
            ("repetition_penalty", 0.01, 100),
            ("seed", 0, (1 << 63) - 1),
        )
        for name, low, high in bounds:
            value: Any = getattr(self, name)
            if name == "seed" and value is None:
                continue
            is_integer = name in ("top_k", "seed")
            kinds: Any = Integral if is_integer else Real
            if not isinstance(value, kinds) or not low <= value <= high:
                kind = "an integer" if is_integer else "a number"
                shown = repr(value)[:60]
                raise PromptError(f"{name} is {shown}; it must be {kind} from {low} to {high}")
            # Also converts NumPy's scalars.
            object.__setattr__(self, name, int(value) if is_integer else float(value))


class Sampler:
    """Samples tokens on the device, without waiting for a value.

    Attributes:
        full_sort: Sort all logits for top-p. By default only the largest are sorted, which nearly
            always reach p; if they do not, the token is UNDECIDED.
    """

    def __init__(self, sampling: Sampling, vocab_size: int, prompt_ids: Iterable[int]):
        """Record the prompt's tokens if repetition is penalised."""
        self.full_sort = False
        self._sampling = sampling
        self._key = mx.random.key(_seed(sampling))
        self._seen: mx.array | None = None
        if sampling.repetition_penalty != 1:
            ids = sorted({i for i in prompt_ids if 0 <= i < vocab_size})
            self._seen = mx.zeros((vocab_size,), mx.bool_)
            if ids:
                self._seen[mx.array(ids)] = True
        mx.eval(self.state)

    @property
    def state(self) -> list[mx.array]:
        """Random key and tokens seen; evaluate it with each token, so that any thread can go on."""
        return [self._key] if self._seen is None else [self._key, self._seen]

    @state.setter
    def state(self, value: list[mx.array]) -> None:
        self._key, self._seen = value[0], value[1] if len(value) > 1 else None

    def __call__(self, logits: mx.array) -> mx.array:
        """Sample from float32 logits (V,); returns a scalar int32, an id or UNDECIDED."""
        if self._seen is not None:
            penalty = self._sampling.repetition_penalty
            penalised = mx.where(logits > 0, logits / penalty, logits * penalty)
            logits = mx.where(self._seen, penalised, logits)
        token = self._sample(logits)
        if self._seen is not None:
            self._seen = self._seen | (mx.arange(self._seen.size) == token)
        return token

    def _sample(self, logits: mx.array) -> mx.array:
        sampling = self._sampling
        if sampling.temperature == 0:
            return mx.argmax(logits).astype(mx.int32)
        logits = logits / sampling.temperature
        decided: mx.array | None = None
        if 0 < sampling.top_k < logits.size:
            largest, _ = _top_blocks(logits, sampling.top_k)
            logits = _mask_below(mx.min(mx.topk(largest, sampling.top_k)), logits)
        if sampling.top_p < 1:
            threshold, decided = _top_p_threshold(logits, sampling.top_p, full_sort=self.full_sort)
            logits = _mask_below(threshold, logits)
        if sampling.min_p > 0:
            logits = _mask_below(mx.max(logits) + math.log(sampling.min_p), logits)
        self._key, key = mx.random.split(self._key)
        token = mx.random.categorical(logits, key=key).astype(mx.int32)
        return token if decided is None else mx.where(decided, token, UNDECIDED)


def _mask_below(threshold: mx.array, logits: mx.array) -> mx.array:
    return mx.where(logits < threshold, -mx.inf, logits)


def _top_blocks(logits: mx.array, count: int) -> tuple[mx.array, mx.array]:
    """Find blocks that contain the `count` largest logits, without sorting all.

    These are the `count` blocks with the largest maxima: every block ranked above one of the
    logits has a larger one.

    Returns:
        The logits of these blocks, (at most count * BLOCK,), and the largest of all others.
    """
    if logits.size <= count * BLOCK:
        return logits, mx.array(-mx.inf)
    blocks = mx.pad(logits, (0, -logits.size % BLOCK), constant_values=-mx.inf).reshape(-1, BLOCK)
    maxima = mx.max(blocks, axis=1)
    order = mx.argpartition(-maxima, count)
    return blocks[order[:count]].reshape(-1), maxima[order[count]]


def _top_p_threshold(
    logits: mx.array, top_p: float, *, full_sort: bool
) -> tuple[mx.array, mx.array]:
    """The smallest logit that top-p keeps, and whether it is certain."""
    largest, other_max = (logits, mx.array(-mx.inf)) if full_sort else _top_blocks(logits, BLOCKS)
    ranked = mx.sort(largest)[::-1]
    probabilities = mx.exp(ranked - mx.logsumexp(logits))
    before = mx.cumsum(probabilities) - probabilities  # probability of all more likely tokens
    threshold = mx.min(mx.where(before < top_p, ranked, ranked[0]))
    certain = mx.sum(mx.where(ranked > other_max, probabilities, 0))  # of logits above all others
    return threshold, (certain >= top_p) | (other_max == -mx.inf)


def _seed(sampling: Sampling) -> int:
    if sampling.seed is not None or sampling.temperature == 0:
        return sampling.seed or 0
    import secrets

    return secrets.randbits(63)
