"""The parts of an answer: text up to a stop text, chunks and statistics."""

import time
from collections.abc import Collection
from dataclasses import dataclass

import mlx.core as mx

from ..preprocess.processor import Processor
from ..preprocess.tokenizer import TextDecoder

LogProbabilities = tuple[float, tuple[tuple[int, float], ...]]  # of the token, and the top ones


@dataclass(frozen=True, slots=True)
class Stats:
    """Time, tokens and memory of an answer.

    Attributes:
        preprocess_s: Seconds to open and resize the images, and to tokenise.
        vision_s: Seconds in the image tower and the projector.
        prefill_s: Seconds in the decoder, up to the first token.
        ttft_s: Seconds to the first token: the sum of the three.
        decode_tokens_per_s: Tokens per second after the first; 0 if there are none.
        image_tokens: Image embeddings in the prompt.
        prompt_tokens: All tokens of the prompt, images included.
        cached_tokens: Prompt tokens whose keys and values came from `prompt_cache`.
        generation_tokens: Tokens of the answer, including the one that ended it.
        peak_memory_bytes: Peak memory of MLX since the process started.
    """

    preprocess_s: float
    vision_s: float
    prefill_s: float
    ttft_s: float
    decode_tokens_per_s: float
    image_tokens: int
    prompt_tokens: int
    cached_tokens: int
    generation_tokens: int
    peak_memory_bytes: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a streamed answer.

    Attributes:
        text: New text, possibly empty.
        token: Id of the generated token; -1 if there is none because of an error.
        finish_reason: None; in the last chunk "stop" or "length", in a batch also "error".
        stats: Statistics so far.
        logprob: Log-probability of the token, if requested: from the unmodified logits, before
            temperature, filters, penalties and constraints.
        top_logprobs: The most likely tokens with their log-probabilities, most likely first.
        error: The exception, if the finish_reason is "error".
    """

    text: str
    token: int
    finish_reason: str | None
    stats: Stats
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """A complete answer.

    Attributes:
        text: The answer.
        token_ids: Its tokens, without the end token.
        finish_reason: "stop" or "length", in a batch also "error".
        stats: Statistics.
        error: The exception, if the finish_reason is "error"; the text is then incomplete.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    stats: Stats
    error: Exception | None = None


def join_chunks(chunks: list[Chunk], processor: Processor) -> Result:
    """Combine the chunks of a complete stream."""
    last = chunks[-1]
    token_ids = [chunk.token for chunk in chunks if chunk.error is None]
    if token_ids and token_ids[-1] in processor.tokenizer.stop_ids:
        token_ids.pop()
    text = "".join(chunk.text for chunk in chunks)
    return Result(text, token_ids, last.finish_reason or "stop", last.stats, last.error)


class AnswerText:
    """Decodes tokens to text and holds back text that may begin a stop text."""

    def __init__(self, decoder: TextDecoder, stops: list[str]):
        self._decoder = decoder
        self._stops = stops
        self._pending = ""
        self._stopped = False

    def feed(self, token_id: int) -> bool:
        """Add a token and return whether a stop text is complete."""
        self._pending += self._decoder.feed(token_id)
        return self._cut_at_stop()

    def _cut_at_stop(self) -> bool:
        starts = [self._pending.find(stop) for stop in self._stops if stop in self._pending]
        if starts:
            self._pending, self._stopped = self._pending[: min(starts)], True
        return self._stopped

    def take(self, *, final: bool) -> str:
        """Remove and return the text that is ready; with `final` all of it."""
        if final and not self._stopped:
            self._pending += self._decoder.finish()
            self._cut_at_stop()
        keep = 0 if final else max((_overlap(self._pending, s) for s in self._stops), default=0)
        ready = self._pending[: len(self._pending) - keep]
        self._pending = self._pending[len(ready) :]
        return ready


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(slots=True)
class Clock:
    """Timestamps of one answer in seconds, from `time.perf_counter`."""

    started: float = 0.0
    preprocess: float = 0.0
    vision: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0

    def record_token(self, count: int) -> None:
        """Record the time of token number `count`, from 1."""
        self.last_token = time.perf_counter()
        if count == 1:
            self.first_token = self.last_token

    def stats(self, count: int, prompt_tokens: int, image_tokens: int, cached_tokens: int) -> Stats:
        """Return the statistics so far."""
        decode_s = self.last_token - self.first_token
        return Stats(
            preprocess_s=self.preprocess - self.started,
            vision_s=self.vision - self.preprocess,
            prefill_s=self.first_token - self.vision,
            ttft_s=self.first_token - self.started,
            decode_tokens_per_s=(count - 1) / decode_s if count > 1 else 0.0,
            image_tokens=image_tokens,
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            generation_tokens=count,
            peak_memory_bytes=mx.get_peak_memory(),
        )


class Answer:
    """An answer in progress: from tokens to chunks."""

    def __init__(
        self,
        text: AnswerText,
        stop_ids: Collection[int],
        max_tokens: int,
        *,
        prompt_tokens: int,
        image_tokens: int,
    ):
        """Begin an answer that ends at one of `stop_ids` or after `max_tokens`."""
        self._text, self._stop_ids, self._max_tokens = text, stop_ids, max_tokens
        self._prompt_tokens, self._image_tokens, self._cached_tokens = (
            prompt_tokens,
            image_tokens,
            0,
        )
        self._clock = Clock()
        self.count = 0  # tokens so far

    def begin(self, clock: Clock, cached_tokens: int) -> None:
        """Record the times of the prefill, and the number of cached prompt tokens."""
        self._clock, self._cached_tokens = clock, cached_tokens

    def add(
        self, token: int, *, is_complete: bool, logprobs: LogProbabilities | None = None
    ) -> Chunk:
        """Add a token; `is_complete` if a constraint allows no more tokens after it."""
        self.count += 1
        self._clock.record_token(self.count)
        finish_reason = "length" if self.count == self._max_tokens else None
        if token in self._stop_ids or self._text.feed(token) or is_complete:
            finish_reason = "stop"
        text = self._text.take(final=finish_reason is not None)
        logprob, top = (None, ()) if logprobs is None else logprobs
        return Chunk(text, token, finish_reason, self._stats(), logprob, top)

    def fail(self, error: Exception) -> Chunk:
        """Return the last chunk of a failed answer."""
        return Chunk(self._text.take(final=True), -1, "error", self._stats(), error=error)

    def _stats(self) -> Stats:
        prompt = self._prompt_tokens, self._image_tokens, self._cached_tokens
        return self._clock.stats(self.count, *prompt)
