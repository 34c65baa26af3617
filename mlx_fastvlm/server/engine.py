"""The one thread that uses MLX: it computes all answers and embeddings, step by step."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

from mlx_mobileclip.concurrency import register_thread

from ..generation.answer import Chunk
from ..generation.request import Request
from .errors import ApiError

T = TypeVar("T")


class Batch(Protocol):
    """The interface of `BatchGenerator` that the engine uses."""

    def add(self, request: Request) -> int:
        """Add a request and return its id."""

    def remove(self, request_id: int) -> None:
        """Cancel a request."""

    def step(self) -> list[tuple[int, Chunk]]:
        """Compute the next chunks."""

    def __len__(self) -> int: ...


class Answer:
    """One answer, whose chunks are awaited in the event loop."""

    def __init__(self, engine: "Engine", request: Request):
        self.request = request
        self.id: int | None = None  # in the batch; used in the engine's thread only
        self._engine = engine
        self._chunks: asyncio.Queue[Chunk | Exception] = asyncio.Queue()
        self._is_done = False

    async def next(self) -> Chunk:
        """Return the next chunk; raises the error that ended the request."""
        chunk = await self._chunks.get()
        if isinstance(chunk, Exception):
            self._is_done = True
            raise chunk
        self._is_done = chunk.finish_reason is not None
        return chunk

    def deliver(self, chunk: Chunk | Exception) -> None:
        """Queue the next chunk or an error; called in the event loop."""
        self._chunks.put_nowait(chunk)

    def close(self) -> None:
        """Cancel the answer unless it has ended; its slot is free before the next step."""
        if not self._is_done:
            self._is_done = True
            self._engine.cancel(self)


class _Call:
    """A function to run in the engine's thread."""

    def __init__(self, function: Callable[[], Any]):
        self.function, self.result = function, Future[Any]()


class Engine:
    """Runs a batch of answers, and other functions between its steps, in a separate thread.

    The public methods are called from the event loop's thread.

    Attributes:
        ready: Resolved when the models are loaded, or with the error if loading fails.
        ended: Resolved when the thread ends, with the error if there was one.
    """

    def __init__(self, new_batch: Callable[[], Batch], loop: asyncio.AbstractEventLoop):
        """Start the thread, which calls `new_batch` to load the models and create a batch."""
        self.ready: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()
        self._new_batch, self._loop = new_batch, loop
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._answers: dict[int, Answer] = {}
        self._calls: deque[_Call] = deque()
        self._stopped = self._has_removed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def answer(self, request: Request) -> Answer:
        """Queue a request and return its answer."""
        answer = Answer(self, request)
        self._commands.put(lambda: self._add(answer))
        return answer

    def cancel(self, answer: Answer) -> None:
        """Remove a request from the batch before the next step."""
        self._commands.put(lambda: self._remove(answer))

    async def call(self, function: Callable[[], T]) -> T:
        """Run a function between two steps; it is skipped if the caller is cancelled."""
        call = _Call(function)
        self._commands.put(lambda: self._calls.append(call))
        result: T = await asyncio.wrap_future(call.result)
        return result

    def stop(self) -> None:
        """End the thread after the current step; unfinished work gets an error."""
        self._commands.put(self._stop)

    def join(self, seconds: float) -> bool:
        """Wait for the thread, and return whether it has ended."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            register_thread()
            self._batch = self._new_batch()
            self._post(partial(_resolve, self.ready, None))
            while not self._stopped:
                self._run_once()
        except BaseException as raised:  # noqa: BLE001 (raised in the event loop)
            error = raised
        self._stopped = True
        self._fail_all(ApiError(503, "the server is shutting down"))
        self._post(partial(_resolve, self.ready, error))
        self._post(partial(_resolve, self.ended, error))

    def _run_once(self) -> None:
        for command in self._take_commands():
            command()
        if self._calls:
            self._run_call(self._calls.popleft())
        if len(self._batch) or self._has_removed:  # the batch frees memory in a step
            self._has_removed = False
            self._step()

    def _take_commands(self) -> Iterator[Callable[[], None]]:
        """Yield queued commands; waits for one if there is nothing else to do."""
        if not len(self._batch) and not self._calls:
            yield self._commands.get()
        while not self._commands.empty():
            yield self._commands.get()

    def _add(self, answer: Answer) -> None:
        try:
            answer.id = self._batch.add(answer.request)
            self._answers[answer.id] = answer
        except Exception as error:  # noqa: BLE001 (delivered to the request)
            self._post(partial(answer.deliver, error))

    def _remove(self, answer: Answer) -> None:
        if answer.id is not None and self._answers.pop(answer.id, None) is not None:
            self._batch.remove(answer.id)
            self._has_removed = True

    def _run_call(self, call: _Call) -> None:
        if not call.result.set_running_or_notify_cancel():
            return
        try:
            call.result.set_result(call.function())
        except Exception as error:  # noqa: BLE001 (raised where the result is awaited)
            call.result.set_exception(error)

    def _step(self) -> None:
        try:
            chunks = self._batch.step()
        except Exception as error:  # noqa: BLE001 (delivered to the answers)
            self._fail_all(error)
            self._batch = self._new_batch()
            return
        delivered: list[tuple[Answer, Chunk | Exception]] = []
        for request_id, chunk in chunks:
            answer = self._answers.get(request_id)
            if answer is not None:
                delivered.append((answer, chunk))
            if chunk.finish_reason is not None:
                self._answers.pop(request_id, None)
        if delivered:
            self._post(partial(_deliver, delivered))

    def _fail_all(self, error: Exception) -> None:
        answers, self._answers = list(self._answers.values()), {}
        self._post(partial(_deliver, [(answer, error) for answer in answers]))
        if self._stopped:
            for call in self._calls:
                if call.result.set_running_or_notify_cancel():
                    call.result.set_exception(error)

    def _stop(self) -> None:
        self._stopped = True

    def _post(self, function: Callable[[], Any]) -> None:
        """Run a function in the event loop, unless it is closed."""
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:  # the loop is closed
            self._stopped = True


def _deliver(chunks: Sequence[tuple[Answer, Chunk | Exception]]) -> None:
    for answer, chunk in chunks:
        answer.deliver(chunk)


def _resolve(future: "asyncio.Future[None]", error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
        future.exception()  # avoids a warning if nobody awaits it
