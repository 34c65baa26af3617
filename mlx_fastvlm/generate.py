"""Answer a prompt about images: prefill in one pass, then one token at a time.

Also the target of `python -m mlx_fastvlm.generate`; the command line is in `cli.py`.
"""

import sys

if __name__ == "__main__":  # first, so that Ctrl-C during the imports below is told in one line
    from .cli import main

    sys.exit(main())

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_mobileclip.checkpoint import is_finite
from mlx_mobileclip.errors import ModelError, PromptError

from .decoding import Decoder
from .model import IMAGE_TOKEN, FastVLM
from .processor import Images, Picture, Processor
from .prompt import Message
from .prompt_cache import PromptCache, describe
from .sampling import Sampler, Sampling
from .tokenizer import TextDecoder

DEFAULT_MAX_TOKENS = 256
RESERVED_TOKENS = 1024  # of an answer, in the KV cache; a longer one makes it grow step by step


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
        generated_tokens: Tokens of the answer, the one that ended it included.
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
    generated_tokens: int
    peak_memory_bytes: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a streamed answer.

    Attributes:
        text: New text, possibly empty.
        token_id: The token that led to it.
        finish_reason: None, and at the end "stop" or "length".
        stats: Figures so far.
    """

    text: str
    token_id: int
    finish_reason: str | None
    stats: Stats


@dataclass(frozen=True, slots=True)
class Result:
    """A whole answer; `token_ids` excludes the end token."""

    text: str
    token_ids: list[int]
    finish_reason: str
    stats: Stats


def generate(
    model: FastVLM,
    processor: Processor,
    prompt: str | Sequence[Message],
    images: Images = None,
    **options: Any,
) -> Result:
    """Answer a prompt and return when the answer is complete.

    Args:
        model: From `load`.
        processor: From `load`.
        prompt: A question, or a list of messages.
        images: One image or several, in the order of their places in the prompt.
        **options: As `stream_generate` takes them.

    Raises:
        ModelError: or one of its subclasses, naming what cannot be used.
    """
    return join(list(stream_generate(model, processor, prompt, images, **options)), processor)


def join(chunks: list[Chunk], processor: Processor) -> Result:
    """The whole answer that a completed stream amounts to."""
    last = chunks[-1]
    token_ids = [chunk.token_id for chunk in chunks]
    if token_ids[-1] in processor.tokenizer.stop_ids:
        token_ids.pop()
    text = "".join(chunk.text for chunk in chunks)
    return Result(text, token_ids, last.finish_reason or "stop", last.stats)


def stream_generate(
    model: FastVLM,
    processor: Processor,
    prompt: str | Sequence[Message],
    images: Images = None,
    *,
    system: str | None = None,
    resolution: int | None = None,
    image_mode: str | None = None,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    kv_bits: int | None = None,
    prompt_cache: PromptCache | None = None,
) -> Iterator[Chunk]:
    """Answer a prompt piece by piece, one chunk a token.

    Args:
        model: From `load`.
        processor: From `load`.
        prompt: A question, or a list of messages (see `prompt.render`).
        images: One image or several, in the order of their places in the prompt.
        system: System prompt instead of the default.
        resolution: Side the images are resized to, px.
        image_mode: "pad" or "crop".
        max_tokens: Most tokens to generate; prompt and answer must fit the model together.
        temperature: 0 for greedy; see `Sampling` for this and the next five.
        top_p: Nucleus probability.
        top_k: Number of tokens to choose from.
        min_p: Least probability relative to the best token's.
        repetition_penalty: Above 1 discourages tokens already seen.
        seed: For a repeatable draw.
        stop: Text or texts that end the answer; they are not part of it.
        kv_bits: 8 or 4 to keep the KV cache in so many bits; by default it is not packed, for at
            the lengths of a FastVLM prompt that saves little.
        prompt_cache: Where to look for what earlier prompts had in common with this one, and to
            keep this one and its answer; by default every prompt is computed whole.

    Yields:
        Chunks; the last one has a finish_reason: "stop" at an end token or stop text, else
        "length".

    Raises:
        ModelError: or one of its subclasses, naming what cannot be used; also when the model's
            arithmetic overflows.
    """
    sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p, seed)
    stops = _stop_texts(stop)
    started = time.perf_counter()
    ids, pictures = processor.prepare(
        prompt, images, system=system, resolution=resolution, image_mode=image_mode
    )
    length, image_tokens = len(ids), ids.count(IMAGE_TOKEN)
    _check_room(length, max_tokens, processor.max_length)
    words = processor.tokenizer
    sampler = Sampler(sampling, words.size, ids)
    cache = model.make_cache(length + min(max_tokens, RESERVED_TOKENS), kv_bits)
    prompt_cache = prompt_cache or PromptCache(max_bytes=0)
    sequence = describe(ids, pictures)
    cached = prompt_cache.fill(model, sequence, cache, kv_bits)
    if pictures:
        pictures = pictures[ids[:cached].count(IMAGE_TOKEN) // pictures[0].count :]
    known, pixels = _look_up(model, pictures)
    clock = _Clock(started, preprocess=time.perf_counter())
    fresh, sound = _encode(model, pixels)
    features = [(known | fresh)[picture.key] for picture in pictures]
    inputs = mx.array([ids[cached:]], mx.int32)
    embeddings = model.embed(inputs, mx.concatenate(features) if features else None)
    decoder = Decoder(model, cache, sampler, words.size)
    first = decoder.queue(inputs, embeddings)
    if not sound.item():  # waits for the images alone
        raise ModelError(
            "the image tower overflowed or its weights are damaged; try --dtype float32"
        )
    clock.vision = time.perf_counter() if fresh else clock.preprocess
    for key, value in fresh.items():
        model.image_cache.put(model, key, value)
    answer = _Answer(TextDecoder(words), stops)
    try:
        for count, token in enumerate(decoder.tokens(first, max_tokens), start=1):
            clock.token(count)
            finish_reason = "length" if count == max_tokens else None
            if token in words.stop_ids or answer.feed(token):
                finish_reason = "stop"
            text = answer.take(final=finish_reason is not None)
            stats = clock.stats(count, length, image_tokens, cached)
            yield Chunk(text, token, finish_reason, stats)
            if finish_reason:
                return
            sequence.append(token)
    finally:  # also when nobody asks for more
        if clock.first:
            prompt_cache.keep(model, sequence, cache, kv_bits)


def _check_room(length: int, max_tokens: int, max_length: int) -> None:
    room = max_length - length
    if not room:
        raise PromptError(f"a prompt of {length} tokens leaves no room for an answer; shorten it")
    if not isinstance(max_tokens, int) or not 1 <= max_tokens <= room:
        raise PromptError(
            f"max_tokens is {max_tokens}; after a prompt of {length} tokens it can be 1 to {room}"
        )


def _stop_texts(stop: str | Sequence[str]) -> list[str]:
    stops = [stop] if isinstance(stop, str) else list(stop)
    if not all(isinstance(text, str) and text for text in stops):
        raise PromptError("a stop text must be a text of at least one character")
    return stops


def _look_up(
    model: FastVLM, pictures: list[Picture]
) -> tuple[dict[str, mx.array], dict[str, NDArray[np.float32]]]:
    """By their keys, the embeddings of the images seen before and the pixels of the others."""
    known: dict[str, mx.array] = {}
    pixels: dict[str, NDArray[np.float32]] = {}
    for picture in pictures:
        if picture.key in known or picture.key in pixels:
            continue
        features = model.image_cache.get(model, picture.key, picture.count)
        if features is None:
            pixels[picture.key] = picture.pixels()
        else:
            known[picture.key] = features
    return known, pixels


def _encode(
    model: FastVLM, pixels: dict[str, NDArray[np.float32]]
) -> tuple[dict[str, mx.array], mx.array]:
    """Embeddings of images, (1, N, D) each, and whether all are finite.

    Both are queued and not waited for, so that the prefill is built meanwhile. Images are encoded
    one by one, so that memory does not grow with their number.
    """
    features: dict[str, mx.array] = {}
    sound = mx.array(True)
    for key, image in pixels.items():
        mx.eval(sound)
        features[key] = model.encode_image(mx.array(image)[None])
        sound = sound & is_finite(features[key])
        mx.async_eval(features[key], sound)
    return features, sound


class _Answer:
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
class _Clock:
    """Points in time of one answer, from `time.perf_counter`."""

    started: float
    preprocess: float
    vision: float = 0.0
    first: float = 0.0
    last: float = 0.0

    def token(self, count: int) -> None:
        self.last = time.perf_counter()
        if count == 1:
            self.first = self.last

    def stats(self, count: int, prompt_tokens: int, image_tokens: int, cached_tokens: int) -> Stats:
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
            generated_tokens=count,
            peak_memory_bytes=mx.get_peak_memory(),
        )


class _CallableModule(ModuleType):
    """`mlx_fastvlm.generate` names this module and its main function; let either be called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Result:
        return generate(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
