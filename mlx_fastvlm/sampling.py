"""From the logits of one position to the next token."""

from collections.abc import Iterable
from dataclasses import dataclass

import mlx.core as mx

from mlx_mobileclip.errors import PromptError


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
            value = getattr(self, name)
            if name == "seed" and value is None:
                continue
            kinds = int if name in ("top_k", "seed") else (int, float)
            if not isinstance(value, kinds) or not low <= value <= high:
                kind = "an integer" if kinds is int else "a number"
                raise PromptError(f"{name} is {value!r}; it must be {kind} from {low} to {high}")


class Sampler:
    """Draws token after token, on the device: nothing here waits for a value."""

    def __init__(self, sampling: Sampling, vocab_size: int, prompt_ids: Iterable[int]):
        """Note which tokens the prompt holds, if repetition is to be penalised."""
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

    def __call__(self, logits: mx.array) -> mx.array:
        """Draw one token from float32 logits (V,); returns a scalar id, int32."""
        if self._seen is not None:
            penalty = self._sampling.repetition_penalty
            penalised = mx.where(logits > 0, logits / penalty, logits * penalty)
            logits = mx.where(self._seen, penalised, logits)
        token = self._draw(logits).astype(mx.int32)
        if self._seen is not None:
            self._seen = self._seen | (mx.arange(self._seen.size) == token)
        return token

    def _draw(self, logits: mx.array) -> mx.array:
        sampling = self._sampling
        if sampling.temperature == 0:
            return mx.argmax(logits)
        logits = logits / sampling.temperature
        if 0 < sampling.top_k < logits.size:
            kth = mx.min(mx.topk(logits, sampling.top_k))
            logits = mx.where(logits < kth, -mx.inf, logits)
        if sampling.top_p < 1:
            logits = _keep_top_p(logits, sampling.top_p)
        if sampling.min_p > 0:
            floor = mx.max(logits) + mx.log(mx.array(sampling.min_p))
            logits = mx.where(logits < floor, -mx.inf, logits)
        self._key, key = mx.random.split(self._key)
        return mx.random.categorical(logits, key=key)


def _keep_top_p(logits: mx.array, top_p: float) -> mx.array:
    order = mx.argsort(-logits)
    ranked = mx.softmax(logits[order])
    before = mx.cumsum(ranked) - ranked  # probability of all more likely tokens
    kept = (before < top_p) | (mx.arange(logits.size) == 0)
    return mx.put_along_axis(logits, order, mx.where(kept, logits[order], -mx.inf), axis=-1)


def _seed(sampling: Sampling) -> int:
    if sampling.seed is not None or sampling.temperature == 0:
        return sampling.seed or 0
    import secrets

    return secrets.randbits(63)
