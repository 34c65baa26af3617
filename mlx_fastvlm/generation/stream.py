"""Answer a prompt about images: prefill in one pass, then one token at a time."""

import copy
import time
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from numbers import Integral
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_mobileclip.caching.fingerprint import Weights
from mlx_mobileclip.checkpoints.weights import is_finite
from mlx_mobileclip.concurrency import enter
from mlx_mobileclip.errors import ModelError, PromptError

from ..defaults import DEFAULT_MAX_TOKENS
from ..models.fastvlm import IMAGE_TOKEN, FastVLM
from ..models.kv_cache import KVCache
from ..preprocess.messages import Message
from ..preprocess.processor import Images, Picture, Processor
from ..preprocess.tokenizer import TextDecoder
from .answer import AnswerText, Chunk, Clock, Result, join
from .image_cache import ImageCache, default_image_cache, image_weights
from .prompt_cache import PromptCache, describe
from .sampling import Sampler, Sampling
from .token_loop import Decoder, Drawn

RESERVED_TOKENS = 1024  # room for the answer in the KV cache; beyond, it grows step by step


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


def stream_generate(
    model: FastVLM,
    processor: Processor,
    prompt: str | Sequence[Message],
    images: Images = None,
    *,
    system: str | None = None,
    resolution: int | None = None,
    image_mode: str | None = None,
    max_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: str | Sequence[str] | None = None,
    kv_bits: int | None = None,
    prompt_cache: PromptCache | None = None,
    image_cache: ImageCache | None = None,
) -> Iterator[Chunk]:
    """Answer a prompt piece by piece, one chunk a token.

    Args:
        model: From `load`.
        processor: From `load`.
        prompt: A question, or a list of messages (see `messages.read_messages`).
        images: One image or several, in the order of their places in the prompt.
        system: System prompt instead of the default.
        resolution: Side the images are resized to, px.
        image_mode: "pad" or "crop".
        max_tokens: Most tokens to generate; prompt and answer must fit the model together. By
            default 256, or as many as there is room for.
        temperature: 0 for greedy; see `Sampling` for this and the next five.
        top_p: Nucleus probability.
        top_k: Number of tokens to choose from.
        min_p: Least probability relative to the best token's.
        repetition_penalty: Above 1 discourages tokens already seen.
        seed: Makes sampling repeatable.
        stop: Text or texts that end the answer; they are not part of it.
        kv_bits: 8 or 4 to quantise the KV cache; off by default, since at the length of a FastVLM
            prompt it saves little.
        prompt_cache: Keys and values of earlier prompts, to re-use a common beginning; this prompt
            and its answer are added. By default every prompt is computed whole.
        image_cache: Embeddings of images seen before; those of new images are added. By default
            one that lives as long as the model.

    Yields:
        Chunks; the last one has a finish_reason: "stop" at an end token or stop text, else
        "length".

    Raises:
        ModelError: or one of its subclasses, naming what cannot be used; also when the model's
            arithmetic overflows.
    """
    enter()
    sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p, seed)
    stops = _stop_texts(stop)
    started = time.perf_counter()
    ids, pictures = processor.prepare(
        prompt, images, system=system, resolution=resolution, image_mode=image_mode
    )
    length, image_tokens = len(ids), ids.count(IMAGE_TOKEN)
    max_tokens = _answer_length(length, max_tokens, processor.max_length)
    tokenizer = processor.tokenizer
    cache = model.make_cache(length + min(max_tokens, RESERVED_TOKENS), kv_bits)
    prompt_cache = PromptCache(max_bytes=0) if prompt_cache is None else prompt_cache
    sequence, weights = describe(ids, pictures), Weights(model)
    cached = prompt_cache.fill(weights, sequence, cache, kv_bits)
    if pictures:
        pictures = pictures[ids[:cached].count(IMAGE_TOKEN) // pictures[0].count :]
    image_cache = default_image_cache(model) if image_cache is None else image_cache
    tower = image_weights(model) if pictures else Weights()
    known, pixels = _look_up(pictures, image_cache, model, tower)
    clock = Clock(started, preprocess=time.perf_counter())
    fresh, sound = _encode(model, pixels)
    prefill = partial(_prefill, model, cache, ids, cached, pictures, sampling, tokenizer.size)
    decoder, first = prefill(known | fresh)
    if not sound.item():  # waits for the images alone
        fresh = _encode_in_float32(model, pixels)
        for layer in cache:
            layer.trim(length - cached)
        decoder, first = prefill(known | fresh)
    clock.vision = time.perf_counter() if fresh else clock.preprocess
    mx.eval(list(fresh.values()))  # done already; this also lets other threads use them
    for key, value in fresh.items():
        image_cache.put(model, tower, key, value)
    answer = AnswerText(TextDecoder(tokenizer), stops)
    try:
        for count, token in enumerate(decoder.tokens(first, max_tokens), start=1):
            clock.token(count)
            finish_reason = "length" if count == max_tokens else None
            if token in tokenizer.stop_ids or answer.feed(token):
                finish_reason = "stop"
            text = answer.take(final=finish_reason is not None)
            stats = clock.stats(count, length, image_tokens, cached)
            yield Chunk(text, token, finish_reason, stats)
            if finish_reason:
                return
            sequence.append(token)
    finally:  # also when nobody asks for more
        if clock.first:
            prompt_cache.keep(weights, sequence, cache, kv_bits)


def _answer_length(length: int, max_tokens: int | None, max_length: int) -> int:
    """Most tokens of the answer to a prompt of so many."""
    room = max_length - length
    if not room:
        raise PromptError(f"a prompt of {length} tokens leaves no room for an answer; shorten it")
    if max_tokens is None:
        return min(DEFAULT_MAX_TOKENS, room)
    if not isinstance(max_tokens, Integral) or not 1 <= max_tokens <= room:
        raise PromptError(
            f"max_tokens is {max_tokens!r:.60}; after a prompt of {length} tokens it can be 1 to "
            f"{room}"
        )
    return int(max_tokens)


def _stop_texts(stop: str | Sequence[str] | None) -> list[str]:
    if not isinstance(stop, (str, list, tuple, set, type(None))):
        raise PromptError(f"stop must be a text or a list of texts, not a {type(stop).__name__}")
    stops = [stop] if isinstance(stop, str) else list(stop or ())
    if not all(isinstance(text, str) and text for text in stops):
        raise PromptError("a stop text must be a text of at least one character")
    return stops


def _look_up(
    pictures: list[Picture], image_cache: ImageCache, model: FastVLM, tower: Weights
) -> tuple[dict[str, mx.array], dict[str, NDArray[np.float32]]]:
    """By their keys, the embeddings of the images seen before and the pixels of the others."""
    known: dict[str, mx.array] = {}
    pixels: dict[str, NDArray[np.float32]] = {}
    for picture in pictures:
        if picture.key in known or picture.key in pixels:
            continue
        features = image_cache.get(model, tower, picture.key, picture.count)
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


def _prefill(
    model: FastVLM,
    cache: list[KVCache],
    ids: list[int],
    cached: int,
    pictures: list[Picture],
    sampling: Sampling,
    known_ids: int,
    features: dict[str, mx.array],
) -> tuple[Decoder, Drawn]:
    """Queue the decoder's pass over the part of a prompt that its cache does not hold."""
    decoder = Decoder(model, cache, Sampler(sampling, known_ids, ids), known_ids)
    inputs = mx.array([ids[cached:]], mx.int32)
    images = [features[picture.key] for picture in pictures]
    embeddings = model.embed(inputs, mx.concatenate(images) if images else None)
    return decoder, decoder.queue(inputs, embeddings)


def _encode_in_float32(
    model: FastVLM, pixels: dict[str, NDArray[np.float32]]
) -> dict[str, mx.array]:
    """Embeddings of images that overflow in half precision, (1, N, D) each.

    Raises:
        ModelError: they overflow in float32, too.
    """
    twin = copy.copy(model)
    twin.vision_tower = copy.deepcopy(model.vision_tower)
    twin.projector = copy.deepcopy(model.projector)
    for module in (twin.vision_tower, *twin.projector):
        module.set_dtype(mx.float32)
    features, sound = _encode(twin, pixels)
    if not sound.item():
        raise ModelError("the image tower overflowed in float32; its weights are damaged")
    warnings.warn(
        "the image tower overflowed and was run again in float32; with dtype float32 it is at once",
        stacklevel=2,
    )
    return features
