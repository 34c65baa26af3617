"""The pieces of an answer: text, statistics, and where a stop text ends it."""

import time
from dataclasses import dataclass

import mlx.core as mx

from ..preprocess.processor import Processor
from ..preprocess.tokenizer import TextDecoder


@dataclass(frozen=True, slots=True)
class Stats:
    """What an answer took; seconds, tokens and bytes as the names say.

    Attributes:
        preprocess_s: Opening and resizing the images, tokenising.
        vision_s: Image tower and projector.
        prefill_s: The decoder over the whole prompt, to the first token.
        ttft_s: Time to first token: all of the above.
        decode_tokens_per_s: Tokens after the first, by the time they took; 0 if there were none.
        image_tokens: Image embeddings in the prompt.
        prompt_tokens: All tokens of the prompt, images included.
        cached_tokens: Those of them whose keys and values came from `prompt_cache`.
        generation_tokens: Tokens of the answer, the one that ended it included.
        peak_memory_bytes: Most memory MLX has held since the process started.
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
        token: Id of the token that led to it.
        finish_reason: None, and at the end "stop" or "length".
        stats: Figures so far.
    """

    text: str
    token: int
    finish_reason: str | None
    stats: Stats


@dataclass(frozen=True, slots=True)
class Result:
    """A whole answer; `token_ids` excludes the end token."""

    text: str
    token_ids: list[int]
    finish_reason: str
    stats: Stats


def join(chunks: list[Chunk], processor: Processor) -> Result:
    """The whole answer that a completed stream amounts to."""
    last = chunks[-1]
    token_ids = [chunk.token for chunk in chunks]
    if token_ids[-1] in processor.tokenizer.stop_ids:
        token_ids.pop()
    text = "".join(chunk.text for chunk in chunks)
    return Result(text, token_ids, last.finish_reason or "stop", last.stats)


class AnswerText:
    """Text so far; holds back what may yet turn out to be part of a stop text."""

    def __init__(self, decoder: TextDecoder, stops: list[str]):
        self._decoder = decoder
        self._stops = stops
        self._held = ""
        self._stopped = False

    def feed(self, token_id: int) -> bool:
        """Add a token; returns whether a stop text is complete."""
        self._held += self._decoder.feed(token_id)
        return self._cut()

    def _cut(self) -> bool:
        places = [self._held.find(stop) for stop in self._stops if stop in self._held]
        if places:
            self._held, self._stopped = self._held[: min(places)], True
        return self._stopped

    def take(self, *, final: bool) -> str:
        """The text that can be shown by now; at the end all of it."""
        if final and not self._stopped:
            self._held += self._decoder.finish()
            self._cut()
        keep = 0 if final else max((_overlap(self._held, s) for s in self._stops), default=0)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(shown) :]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that is a beginning of the stop text."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(slots=True)
class Clock:
    """Points in time of one answer, from `time.perf_counter`."""

    started: float
    preprocess: float
    vision: float = 0.0
    first: float = 0.0
    last: float = 0.0

    def token(self, count: int) -> None:
        """Note the arrival of a token, the first being number 1."""
        self.last = time.perf_counter()
        if count == 1:
            self.first = self.last

    def stats(self, count: int, prompt_tokens: int, image_tokens: int, cached_tokens: int) -> Stats:
        """The statistics so far."""
        decode_s = self.last - self.first
        return Stats(
            preprocess_s=self.preprocess - self.started,
            vision_s=self.vision - self.preprocess,
            prefill_s=self.first - self.vision,
            ttft_s=self.first - self.started,
            decode_tokens_per_s=(count - 1) / decode_s if count > 1 else 0.0,
            image_tokens=image_tokens,
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            generation_tokens=count,
            peak_memory_bytes=mx.get_peak_memory(),
        )
