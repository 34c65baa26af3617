"""The parts of an answer: text up to a stop text, chunks and statistics."""

import time
from dataclasses import dataclass

import mlx.core as mx

from ..preprocess.processor import Processor
from ..preprocess.tokenizer import TextDecoder


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
        token: Id of the generated token.
        finish_reason: None; in the last chunk "stop" or "length".
        stats: Statistics so far.
    """

    text: str
    token: int
    finish_reason: str | None
    stats: Stats


@dataclass(frozen=True, slots=True)
class Result:
    """A complete answer; `token_ids` excludes the end token."""

    text: str
    token_ids: list[int]
    finish_reason: str
    stats: Stats


def join_chunks(chunks: list[Chunk], processor: Processor) -> Result:
    """Combine the chunks of a complete stream."""
    last = chunks[-1]
    token_ids = [chunk.token for chunk in chunks]
    if token_ids[-1] in processor.tokenizer.stop_ids:
        token_ids.pop()
    text = "".join(chunk.text for chunk in chunks)
    return Result(text, token_ids, last.finish_reason or "stop", last.stats)


class AnswerText:
    """Decodes tokens to text and holds back what may be the beginning of a stop text."""

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

    started: float
    preprocess: float
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
