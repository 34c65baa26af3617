"""Prepare a request, and run its prompt through the image tower and the decoder."""

import copy
import time
import warnings
from collections.abc import Sequence
from numbers import Integral

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_mobileclip.caching.fingerprint import Weights
from mlx_mobileclip.checkpoints.weights import is_finite
from mlx_mobileclip.concurrency import register_thread
from mlx_mobileclip.errors import ModelError, PromptError

from ..defaults import DEFAULT_MAX_TOKENS
from ..models.fastvlm import IMAGE_TOKEN, FastVLM
from ..models.kv_cache import KVCache
from ..models.sharding import from_first_rank
from ..preprocess.processor import Picture, Processor
from ..preprocess.tokenizer import TextDecoder
from .answer import Answer, AnswerText, Clock
from .constrained_loop import ConstrainedDecoder, ConstrainedSampler, Matcher
from .constraints import Constraint
from .image_cache import ImageCache, default_image_cache, image_weights
from .prompt_cache import PromptCache, to_sequence
from .request import Request
from .sampling import Sampler, Sampling
from .token_loop import Decoder, PendingToken

MAX_LOGPROBS = 20


class PreparedRequest:
    """A request that has been checked, with its token ids and its images.

    Attributes:
        max_tokens: Maximum number of tokens of the answer.
        sequence: Tokens of the prompt, and those of the answer that the caller has appended.
        answer: The answer in progress.
    """

    def __init__(
        self,
        model: FastVLM,
        processor: Processor,
        request: Request,
        prompt_cache: PromptCache | None = None,
        image_cache: ImageCache | None = None,
    ):
        """Check everything except the content of the images.

        Raises:
            ModelError: the request is invalid; a subclass such as `PromptError` says why.
        """
        register_thread()
        self._sampling = Sampling(
            request.repetition_penalty,
            request.temperature,
            request.top_k,
            request.top_p,
            request.min_p,
            request.seed,
        )
        stops = _stop_texts(request.stop)
        self._logprobs = _checked_logprobs(request.logprobs)
        constraint = Constraint.of(request.schema, request.choice, request.regex, stops)
        tokenizer = processor.tokenizer
        self._matcher = None if constraint is None else Matcher(constraint, tokenizer)
        started = time.perf_counter()
        self._ids, self._pictures = processor.prepare(
            request.prompt,
            request.images,
            system=request.system,
            resolution=request.resolution,
            image_mode=request.image_mode,
        )
        self.max_tokens = _answer_length(len(self._ids), request.max_tokens, processor.max_length)
        self._model, self._vocab_size, self._kv_bits = model, tokenizer.size, request.kv_bits
        self._image_cache = image_cache
        self._prompt_cache = PromptCache(max_bytes=0) if prompt_cache is None else prompt_cache
        self._weights = Weights()
        self.sequence = to_sequence(self._ids, self._pictures)
        self.answer = Answer(
            AnswerText(TextDecoder(tokenizer), stops),
            tokenizer.stop_ids,
            self.max_tokens,
            prompt_tokens=len(self._ids),
            image_tokens=self._ids.count(IMAGE_TOKEN),
        )
        self._prepare_s = time.perf_counter() - started

    def prefill(self, reserved_tokens: int = 0) -> tuple[Decoder, PendingToken]:
        """Encode the images and queue the decoder's pass over the prompt.

        Args:
            reserved_tokens: Answer tokens for which the KV cache allocates space in advance.

        Returns:
            A decoder that continues the prompt, and the pending first token.

        Raises:
            ModelError: an image is damaged, or the image tower overflows in float32 too.
        """
        started = time.perf_counter() - self._prepare_s
        model, ids, pictures = self._model, self._ids, self._pictures
        cache = model.make_cache(len(ids) + reserved_tokens, self._kv_bits)
        self._weights = Weights(model)
        cached = self._prompt_cache.fill(self._weights, self.sequence, cache, self._kv_bits)
        if pictures:
            pictures = pictures[ids[:cached].count(IMAGE_TOKEN) // pictures[0].count :]
        image_cache = self._image_cache
        image_cache = default_image_cache(model) if image_cache is None else image_cache
        tower_weights = image_weights(model) if pictures else Weights()
        cached_features, pixels = _look_up(pictures, image_cache, model, tower_weights)
        clock = Clock(started, preprocess=time.perf_counter())
        new_features, all_finite = _encode(model, pixels)
        all_finite = from_first_rank(all_finite, model._group)  # all ranks must branch alike
        mx.async_eval(all_finite)
        decoder, first = self._queue(cache, cached, pictures, cached_features | new_features)
        if not all_finite.item():  # waits only for the image tower
            new_features = _encode_in_float32(model, pixels)
            for layer in cache:
                layer.trim(len(ids) - cached)
            decoder, first = self._queue(cache, cached, pictures, cached_features | new_features)
        clock.vision = time.perf_counter() if new_features else clock.preprocess
        mx.eval(list(new_features.values()))  # already computed; this lets other threads use them
        for key, value in new_features.items():
            image_cache.put(model, tower_weights, key, value)
        self.answer.begin(clock, cached)
        self._pictures = []  # may be large
        return decoder, first

    def _queue(
        self,
        cache: list[KVCache],
        cached: int,
        pictures: list[Picture],
        features: dict[str, mx.array],
    ) -> tuple[Decoder, PendingToken]:
        """Queue the decoder's pass over the prompt tokens that its cache does not hold."""
        arguments = self._sampling, self._vocab_size, self._ids
        if self._matcher is None:
            sampler = Sampler(*arguments)
            decoder = Decoder(self._model, cache, sampler, self._vocab_size, self._logprobs)
        else:
            sampler = ConstrainedSampler(*arguments, self._matcher)
            decoder = ConstrainedDecoder(
                self._model, cache, sampler, self._vocab_size, self._logprobs
            )
        inputs = mx.array([self._ids[cached:]], mx.int32)
        images = [features[picture.key] for picture in pictures]
        embeddings = self._model.embed(inputs, mx.concatenate(images) if images else None)
        return decoder, decoder.queue(inputs, embeddings)

    def keep(self, cache: list[KVCache]) -> None:
        """Store keys and values of the sequence in the prompt cache."""
        self._prompt_cache.keep(self._weights, list(self.sequence), cache, self._kv_bits)


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
        raise PromptError(
            f"stop must be a string or a list of strings, not a {type(stop).__name__}"
        )
    stops = [stop] if isinstance(stop, str) else list(stop or ())
    if not all(isinstance(text, str) and text for text in stops):
        raise PromptError("every stop text must be a non-empty string")
    return stops


def _checked_logprobs(logprobs: int | None) -> int | None:
    if logprobs is None:
        return None
    is_integer = isinstance(logprobs, Integral) and not isinstance(logprobs, bool)
    if not is_integer or not 0 <= logprobs <= MAX_LOGPROBS:
        raise PromptError(f"logprobs is {logprobs!r:.60}; it must be 0 to {MAX_LOGPROBS}")
    return int(logprobs)


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
    """Return image embeddings, (1, N, D) each, and whether all values are finite.

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
