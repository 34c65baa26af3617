"""Continuous batching: answer several requests at once, admitting others as they end."""

from collections import deque
from collections.abc import Sequence
from numbers import Integral
from threading import Lock

from mlx_mobileclip.concurrency import register_thread
from mlx_mobileclip.errors import ConfigError, ModelError, PromptError
from mlx_mobileclip.gpu.memory import wired_weights

from ..models.fastvlm import FastVLM
from ..preprocess.processor import Processor
from .answer import Chunk, Clock, Result, join_chunks
from .batch_loop import BatchDecoder, NextToken
from .image_cache import ImageCache
from .prefill import PreparedRequest
from .prompt_cache import PromptCache
from .request import Request

MAX_BATCH_SIZE = 256


def generate_batch(
    model: FastVLM,
    processor: Processor,
    requests: Sequence[Request],
    *,
    max_batch_size: int = 8,
    prompt_cache: PromptCache | None = None,
    image_cache: ImageCache | None = None,
) -> list[Result]:
    """Answer several requests in batches, and return when all are answered.

    Args:
        model: From `load`.
        processor: From `load`.
        requests: Prompts with images and options.
        max_batch_size: As for `BatchGenerator`, like the caches.
        prompt_cache: Keys and values of earlier prompts.
        image_cache: Embeddings of images seen before.

    Returns:
        A result for each request, in order. A failed request has its exception as `error`.

    Raises:
        ModelError: no request can be answered with these arguments.
    """
    requests = list(requests)
    for request in requests:
        _check_type(request)
    batch = BatchGenerator(
        model,
        processor,
        max_batch_size=max_batch_size,
        prompt_cache=prompt_cache,
        image_cache=image_cache,
    )
    chunks: list[list[Chunk]] = [[] for _ in requests]
    by_id: dict[int, list[Chunk]] = {}
    remaining = deque(zip(requests, chunks, strict=True))
    while remaining or len(batch):
        while remaining and batch.waiting < 2:  # waiting requests hold their images
            request, request_chunks = remaining.popleft()
            try:
                by_id[batch.add(request)] = request_chunks
            except ModelError as error:
                chunk = Chunk("", -1, "error", Clock().stats(0, 0, 0, 0), error=error)
                request_chunks.append(chunk)
        for request_id, chunk in batch.step():
            by_id[request_id].append(chunk)
    return [join_chunks(request_chunks, processor) for request_chunks in chunks]


class BatchGenerator:
    """Answers requests with continuous batching: each step adds a token to every running one.

    A waiting request is admitted when another ends. Apart from rounding, answers do not depend on
    the other requests. Memory is that of the longest running prompt and answer times the number
    of running requests, and is freed when they end.

    Thread-safe: a step runs in one thread at a time, and `add` and `remove` do not wait for it.
    """

    def __init__(
        self,
        model: FastVLM,
        processor: Processor,
        *,
        max_batch_size: int = 8,
        prompt_cache: PromptCache | None = None,
        image_cache: ImageCache | None = None,
    ):
        """Create an empty batch.

        Args:
            model: From `load`, not divided among processes.
            processor: From `load`.
            max_batch_size: Maximum number of requests that run at once; others wait.
            prompt_cache: As for `stream_generate`; prompts are added as soon as they are computed.
            image_cache: As for `stream_generate`.

        Raises:
            ConfigError: the size is not 1 to 256, or the model is divided among processes.
        """
        is_integer = isinstance(max_batch_size, Integral) and not isinstance(max_batch_size, bool)
        if not is_integer or not 1 <= max_batch_size <= MAX_BATCH_SIZE:
            raise ConfigError(
                f"max_batch_size is {max_batch_size!r:.40}; it must be 1 to {MAX_BATCH_SIZE}"
            )
        if model._group is not None:
            raise ConfigError(
                "a model that is divided among processes answers one request at a time; use "
                "generate, or load it in one process"
            )
        self._model, self._processor, self._size = model, processor, max_batch_size
        self._prompt_cache, self._image_cache = prompt_cache, image_cache
        self._decoder = BatchDecoder(model)
        self._waiting: dict[int, PreparedRequest] = {}
        self._running: dict[int, PreparedRequest] = {}  # in the order of the decoder's rows
        self._removed: set[int] = set()  # removed requests that still have a row
        self._last_id = 0
        self._lock, self._stepping = Lock(), Lock()  # the first guards the fields above

    def add(self, request: Request) -> int:
        """Check a request, and add it to the waiting ones.

        Everything is checked except the content of the images.

        Returns:
            The id by which `step` identifies its chunks.

        Raises:
            ModelError: the request is invalid; a subclass such as `PromptError` says why.
        """
        _check_type(request)
        if request.kv_bits is not None:
            raise ConfigError("kv_bits is for single answers, not batches; leave it out")
        prepared = PreparedRequest(
            self._model, self._processor, request, self._prompt_cache, self._image_cache
        )
        with self._lock:
            self._last_id += 1
            self._waiting[self._last_id] = prepared
            return self._last_id

    def remove(self, request_id: int) -> None:
        """Cancel a request; its row is freed before the next step.

        Ids of finished requests and unknown ids are ignored. A step that runs at the same time may
        still return a chunk of the request.
        """
        with self._lock:
            if request_id in self._running:
                self._removed.add(request_id)
            self._waiting.pop(request_id, None)

    def __len__(self) -> int:
        """Number of requests waiting or running."""
        with self._lock:
            return len(self._waiting) + len(self._running) - len(self._removed)

    @property
    def waiting(self) -> int:
        """Number of waiting requests."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of running requests."""
        with self._lock:
            return len(self._running) - len(self._removed)

    def step(self) -> list[tuple[int, Chunk]]:
        """Compute the next token of every running request.

        If there is room, the request that has waited longest is admitted first: its images and
        prompt are processed within this step. At most one request is admitted per step.

        Returns:
            The id and the new chunk of each request that ran. The last chunk of a request has a
            finish_reason. It is "error", with the exception as `error`, if its images cannot be
            read or something else failed for this request only; if the decoder fails, all running
            requests end that way. Empty if there are no requests. An interrupted step ends the
            running requests without a chunk.
        """
        chunks: list[tuple[int, Chunk]] = []
        with self._stepping, wired_weights():
            register_thread()
            try:
                self._drop(set(self._removed))
                chunks += self._admit()
                chunks += self._advance()
            except BaseException as error:  # rows may be in an inconsistent state
                ended = dict(self._running)
                self._decoder = BatchDecoder(self._model)
                self._forget(set(ended))
                if not isinstance(error, Exception):
                    raise
                chunks += [(i, prepared.answer.fail(error)) for i, prepared in ended.items()]
        return chunks

    def _admit(self) -> list[tuple[int, Chunk]]:
        """Prefill the next request; returns its last chunk if that fails."""
        with self._lock:
            if not self._waiting or len(self._running) == self._size:
                return []
            request_id = next(iter(self._waiting))
            prepared = self._running[request_id] = self._waiting.pop(request_id)
        try:
            decoder, first = prepared.prefill()
        except Exception as error:  # noqa: BLE001 (reported as a chunk; other requests go on)
            self._forget({request_id})
            return [(request_id, prepared.answer.fail(error))]
        self._decoder.add(decoder, first, prepared.max_tokens)
        return []

    def _advance(self) -> list[tuple[int, Chunk]]:
        """Compute the next token of all rows, and drop rows that have ended."""
        if not self._running:
            return []
        tokens = self._decoder.step()
        rows = enumerate(zip(self._running.items(), tokens, strict=True))
        chunks = [(i, self._chunk(row, prepared, token)) for row, ((i, prepared), token) in rows]
        self._drop({request_id for request_id, chunk in chunks if chunk.finish_reason})
        return chunks

    def _chunk(self, row: int, prepared: PreparedRequest, next_token: NextToken) -> Chunk:
        """Add a token to the answer of a row."""
        answer = prepared.answer
        if next_token.error is not None:
            return answer.fail(next_token.error)
        chunk = answer.add(
            next_token.token, is_complete=next_token.is_complete, logprobs=next_token.logprobs
        )
        if answer.count == 1 or chunk.finish_reason:
            prepared.keep(self._decoder.cache_of(row))
        if not chunk.finish_reason:
            prepared.sequence.append(next_token.token)
        return chunk

    def _drop(self, ids: set[int]) -> None:
        """Free the rows of running requests."""
        if ids:
            self._decoder.keep([row for row, i in enumerate(self._running) if i not in ids])
            self._forget(ids)

    def _forget(self, ids: set[int]) -> None:
        with self._lock:
            for request_id in ids:
                self._running.pop(request_id, None)
            self._removed -= ids


def _check_type(request: object) -> None:
    if not isinstance(request, Request):
        raise PromptError(f"a request must be a Request, not a {type(request).__name__}")
