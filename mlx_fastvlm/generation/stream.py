"""Answer a prompt about images: prefill in one pass, then one token at a time."""

import copy
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
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
from ..models.sharding import from_first_rank
from ..preprocess.messages import Message
from ..preprocess.processor import Images, Picture, Processor
from ..preprocess.tokenizer import TextDecoder
from .answer import AnswerText, Chunk, Clock, Result, join_chunks
from .constrained_loop import ConstrainedDecoder, ConstrainedSampler, Matcher
from .constraints import Constraint
from .image_cache import ImageCache, default_image_cache, image_weights
from .prompt_cache import PromptCache, to_sequence
from .sampling import Sampler, Sampling
from .token_loop import Decoder, PendingToken

RESERVED_TOKENS = 1024  # of the answer, allocated in advance in the KV cache


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
        **options: Keyword arguments of `stream_generate`.

    Raises:
        ModelError: or one of its subclasses, naming what cannot be used.
    """
    chunks = list(stream_generate(model, processor, prompt, images, **options))
    return join_chunks(chunks, processor)


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
    schema: object = None,
    choice: Iterable[str] | None = None,
    regex: str | None = None,
    kv_bits: int | None = None,
    prompt_cache: PromptCache | None = None,
    image_cache: ImageCache | None = None,
) -> Iterator[Chunk]:
    """Answer a prompt as a stream of chunks, one for each token.

    Args:
        model: From `load`.
        processor: From `load`.
        prompt: A question, or a list of messages (see `messages.read_messages`).
        images: One image or several, in the order of their places in the prompt.
        system: System prompt instead of the default.
        resolution: Side in pixels that images are resized to.
        image_mode: "pad" or "crop".
        max_tokens: Maximum number of tokens; prompt and answer together must fit the model. By
            default 256, or as many as fit.
        temperature: 0 for greedy; see `Sampling` for this and the next five.
        top_p: Nucleus probability.
        top_k: Number of tokens to sample from.
        min_p: Least probability, relative to the most likely token's.
        repetition_penalty: Above 1 discourages tokens already seen.
        seed: Makes sampling repeatable.
        stop: Text or texts that end the answer; they are not part of it.
        schema: The answer is JSON of this schema: a dictionary, a pydantic model or a dataclass.
        choice: The answer is one of these texts.
        regex: The whole answer matches this regular expression. Of these three only one can be
            given, and no stop text with it. If the answer ends with "stop", it meets it.
        kv_bits: 8 or 4 to quantise the KV cache; off by default, since at the length of a FastVLM
            prompt it saves little.
        prompt_cache: Keys and values of earlier prompts, to reuse a common prefix; this prompt and
            its answer are added. By default the whole prompt is computed.
        image_cache: Embeddings of images seen before; those of new images are added. By default
            one that lives as long as the model.

    Yields:
        Chunks; the last one has a finish_reason: "stop" at an end token, at a stop text or where
        a constraint leaves nothing to add, else "length".

    Raises:
        ModelError: or one of its subclasses, naming what cannot be used; also when the model's
            arithmetic overflows.
    """
    enter()
    sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p, seed)
    stops = _stop_texts(stop)
    constraint = Constraint.of(schema, choice, regex, stops)
    tokenizer = processor.tokenizer
    matcher = None if constraint is None else Matcher(constraint, tokenizer)
    started = time.perf_counter()
    ids, pictures = processor.prepare(
        prompt, images, system=system, resolution=resolution, image_mode=image_mode
    )
    length, image_tokens = len(ids), ids.count(IMAGE_TOKEN)
    max_tokens = _answer_length(length, max_tokens, processor.max_length)
    cache = model.make_cache(length + min(max_tokens, RESERVED_TOKENS), kv_bits)
    prompt_cache = PromptCache(max_bytes=0) if prompt_cache is None else prompt_cache
    sequence, weights = to_sequence(ids, pictures), Weights(model)
    cached = prompt_cache.fill(weights, sequence, cache, kv_bits)
    if pictures:
        pictures = pictures[ids[:cached].count(IMAGE_TOKEN) // pictures[0].count :]
    image_cache = default_image_cache(model) if image_cache is None else image_cache
    tower_weights = image_weights(model) if pictures else Weights()
    cached_features, pixels = _look_up(pictures, image_cache, model, tower_weights)
    clock = Clock(started, preprocess=time.perf_counter())
    new_features, all_finite = _encode(model, pixels)
    all_finite = from_first_rank(all_finite, model._group)  # all ranks must go on alike
    mx.async_eval(all_finite)
    prefill = partial(
        _prefill, model, cache, ids, cached, pictures, sampling, tokenizer.size, matcher
    )
    decoder, first = prefill(cached_features | new_features)
    if not all_finite.item():  # waits only for the images
        new_features = _encode_in_float32(model, pixels)
        for layer in cache:
            layer.trim(length - cached)
        decoder, first = prefill(cached_features | new_features)
    clock.vision = time.perf_counter() if new_features else clock.preprocess
    mx.eval(list(new_features.values()))  # already computed; this lets other threads use them
    for key, value in new_features.items():
        image_cache.put(model, tower_weights, key, value)
    answer = AnswerText(TextDecoder(tokenizer), stops)
    try:
        for count, token in enumerate(decoder.tokens(first, max_tokens), start=1):
            clock.record_token(count)
            finish_reason = "length" if count == max_tokens else None
            if token in tokenizer.stop_ids or answer.feed(token):
                finish_reason = "stop"
            if matcher is not None and matcher.is_complete:
                finish_reason = "stop"
            text = answer.take(final=finish_reason is not None)
            stats = clock.stats(count, length, image_tokens, cached)
            yield Chunk(text, token, finish_reason, stats)
            if finish_reason:
                return
            sequence.append(token)
    finally:  # also if the caller stops early
        if clock.first_token:
            prompt_cache.keep(weights, sequence, cache, kv_bits)


def _answer_length(length: int, max_tokens: int | None, max_length: int) -> int:
    """Maximum number of answer tokens after a prompt of `length` tokens."""
    room = max_length - length
    if not room:
        raise PromptError(f"a prompt of {length} tokens leaves no room for an answer; shorten it")
    if max_tokens is None:
        return min(DEFAULT_MAX_TOKENS, room)
    if not isinstance(max_tokens, Integral) or not 1 <= max_tokens <= room:
        raise PromptError(
            f"max_tokens is {max_tokens!r:.60}; after a prompt of {length} tokens it must be 1 to "
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
    pictures: list[Picture], image_cache: ImageCache, model: FastVLM, tower_weights: Weights
) -> tuple[dict[str, mx.array], dict[str, NDArray[np.float32]]]:
    """Return cached embeddings by image key, and the pixels of all other images."""
    cached_features: dict[str, mx.array] = {}
    pixels: dict[str, NDArray[np.float32]] = {}
    for picture in pictures:
        if picture.key in cached_features or picture.key in pixels:
            continue
        features = image_cache.get(model, tower_weights, picture.key, picture.count)
        if features is None:
            pixels[picture.key] = picture.pixels()
        else:
            cached_features[picture.key] = features
    return cached_features, pixels


def _encode(
    model: FastVLM, pixels: dict[str, NDArray[np.float32]]
) -> tuple[dict[str, mx.array], mx.array]:
    """Encode images, (1, N, D) each; also returns whether all values are finite.

    Both are evaluated asynchronously, while the prefill is built. Images are encoded one by one,
    so that memory does not grow with their number.
    """
    features: dict[str, mx.array] = {}
    all_finite = mx.array(True)
    for key, image in pixels.items():
        mx.eval(all_finite)
        features[key] = model.encode_image(mx.array(image)[None])
        all_finite = all_finite & is_finite(features[key])
        mx.async_eval(features[key], all_finite)
    return features, all_finite


def _prefill(
    model: FastVLM,
    cache: list[KVCache],
    ids: list[int],
    cached: int,
    pictures: list[Picture],
    sampling: Sampling,
    vocab_size: int,
    matcher: Matcher | None,
    features: dict[str, mx.array],
) -> tuple[Decoder, PendingToken]:
    """Queue the decoder's pass over the prompt tokens that its cache does not hold."""
    if matcher is None:
        decoder = Decoder(model, cache, Sampler(sampling, vocab_size, ids), vocab_size)
    else:
        sampler = ConstrainedSampler(sampling, vocab_size, ids, matcher)
        decoder = ConstrainedDecoder(model, cache, sampler, vocab_size)
    inputs = mx.array([ids[cached:]], mx.int32)
    images = [features[picture.key] for picture in pictures]
    embeddings = model.embed(inputs, mx.concatenate(images) if images else None)
    return decoder, decoder.queue(inputs, embeddings)


def _encode_in_float32(
    model: FastVLM, pixels: dict[str, NDArray[np.float32]]
) -> dict[str, mx.array]:
    """Encode images that overflow in half precision, (1, N, D) each.

    Raises:
        ModelError: they overflow in float32 as well.
    """
    float32_model = copy.copy(model)
    float32_model.vision_tower = copy.deepcopy(model.vision_tower)
    float32_model.projector = copy.deepcopy(model.projector)
    for module in (float32_model.vision_tower, *float32_model.projector):
        module.set_dtype(mx.float32)
    features, all_finite = _encode(float32_model, pixels)
    if not all_finite.item():
        raise ModelError("the image tower overflowed in float32; its weights are damaged")
    warnings.warn(
        "the image tower overflowed and was run again in float32; load with dtype float32 to "
        "avoid this",
        stacklevel=2,
    )
    return features
