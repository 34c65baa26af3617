"""From the logits of one position to the next token."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import mlx.core as mx

from mlx_mobileclip.errors import PromptError

UNDECIDED = -2  # instead of a token: set `thorough`, put the state back and draw again
BLOCKS, BLOCK = 64, 64  # how many blocks of logits are sorted for top-p, and their width


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn. Filters apply in transformers' order, as listed.

    Attributes:
        repetition_penalty: Divides the positive logits of tokens already seen, multiplies the
            negative ones (arXiv:1909.05858); 1 is off.
        temperature: 0 takes the most likely token; above, logits are divided by it.
        top_k: Keep the k most likely tokens; 0 is off.
        top_p: Keep the fewest most likely tokens whose probabilities reach p; 1 is off.
        min_p: Keep tokens at least this likely relative to the most likely; 0 is off.
        seed: Same seed, same answer; None draws a new one each time.
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
            whole = name in ("top_k", "seed")
            kinds: Any = Integral if whole else Real
            if not isinstance(value, kinds) or not low <= value <= high:
                kind = "an integer" if whole else "a number"
                shown = repr(value)[:60]
                raise PromptError(f"{name} is {shown}; it must be {kind} from {low} to {high}")
            object.__setattr__(self, name, int(value) if whole else float(value))  # of NumPy


class Sampler:
    """Draws token after token, on the device: nothing here waits for a value.

    Attributes:
        thorough: Sort all logits for top-p. At first only the likeliest are, among which the p is
            nearly always reached; where it is not, the token is UNDECIDED.
    """

    def __init__(self, sampling: Sampling, vocab_size: int, prompt_ids: Iterable[int]):
        """Note which tokens the prompt holds, if repetition is to be penalised."""
        self.thorough = False
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
        """What later draws depend on; evaluate it with each token, so that any thread can go on."""
        return [self._key] if self._seen is None else [self._key, self._seen]

    @state.setter
    def state(self, value: list[mx.array]) -> None:
        self._key, self._seen = value[0], value[1] if len(value) > 1 else None

    def __call__(self, logits: mx.array) -> mx.array:
        """Draw one token from float32 logits (V,); returns a scalar id, int32, or UNDECIDED."""
        if self._seen is not None:
            penalty = self._sampling.repetition_penalty
            penalised = mx.where(logits > 0, logits / penalty, logits * penalty)
            logits = mx.where(self._seen, penalised, logits)
        token = self._draw(logits)
        if self._seen is not None:
            self._seen = self._seen | (mx.arange(self._seen.size) == token)
        return token

    def _draw(self, logits: mx.array) -> mx.array:
        sampling = self._sampling
        if sampling.temperature == 0:
            return mx.argmax(logits).astype(mx.int32)
        logits = logits / sampling.temperature
        decided: mx.array | None = None
        if 0 < sampling.top_k < logits.size:
            near, _ = _likeliest(logits, sampling.top_k)
            logits = _drop_below(mx.min(mx.topk(near, sampling.top_k)), logits)
        if sampling.top_p < 1:
            least, decided = _least_of_top_p(logits, sampling.top_p, thorough=self.thorough)
            logits = _drop_below(least, logits)
        if sampling.min_p > 0:
            logits = _drop_below(mx.max(logits) + math.log(sampling.min_p), logits)
        self._key, key = mx.random.split(self._key)
        token = mx.random.categorical(logits, key=key).astype(mx.int32)
        return token if decided is None else mx.where(decided, token, UNDECIDED)


def _drop_below(least: mx.array, logits: mx.array) -> mx.array:
    return mx.where(logits < least, -mx.inf, logits)


def _likeliest(logits: mx.array, count: int) -> tuple[mx.array, mx.array]:
    """The `count` largest logits, with others, found without sorting all.

    They lie in the `count` blocks whose maxima are the largest: each block ahead of one of them
    holds a larger one.

    Returns:
        The logits of these blocks, (at most count * BLOCK,), and the largest outside of them.
    """
    if logits.size <= count * BLOCK:
        return logits, mx.array(-mx.inf)
    blocks = mx.pad(logits, (0, -logits.size % BLOCK), constant_values=-mx.inf).reshape(-1, BLOCK)
    maxima = mx.max(blocks, axis=1)
    order = mx.argpartition(-maxima, count)
    return blocks[order[:count]].reshape(-1), maxima[order[count]]


def _least_of_top_p(logits: mx.array, top_p: float, *, thorough: bool) -> tuple[mx.array, mx.array]:
    """The least logit that top-p keeps, and whether it is certain to be the one."""
    near, outside = (logits, mx.array(-mx.inf)) if thorough else _likeliest(logits, BLOCKS)
    ranked = mx.sort(near)[::-1]
    probabilities = mx.exp(ranked - mx.logsumexp(logits))
    before = mx.cumsum(probabilities) - probabilities  # probability of all more likely tokens
    least = mx.min(mx.where(before < top_p, ranked, ranked[0]))
    complete = mx.sum(mx.where(ranked > outside, probabilities, 0))  # of what none is missing
    return least, (complete >= top_p) | (outside == -mx.inf)


def _seed(sampling: Sampling) -> int:
    if sampling.seed is not None or sampling.temperature == 0:
        return sampling.seed or 0
    import secrets

    return secrets.randbits(63)
