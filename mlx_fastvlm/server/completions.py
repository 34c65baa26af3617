"""The endpoint /v1/chat/completions: complete or streamed answers."""

import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from mlx_mobileclip.errors import ImageError

from ..generation.answer import Chunk
from ..generation.constraints import Constraint
from ..preprocess.processor import Processor
from .chat import ChatCall
from .chat_objects import ChatObjects
from .engine import Answer, Engine
from .errors import to_api_error
from .metrics import Metrics
from .pictures import Pictures, image_error


class EventStream(Response):
    """Server-sent events, each sent as soon as it is available."""

    def __init__(self, events: AsyncIterator[str]):
        super().__init__(
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        head = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **head})
        async for event in self._events:
            body = f"data: {event}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Completion:
    """One chat completion, from request to response."""

    def __init__(
        self,
        call: ChatCall,
        metrics: Metrics,
        model: str,
        processor: Processor,
        report: Callable[[Exception], None],
    ):
        """Begin; `report` logs errors that occur after the response has begun."""
        self._report = report
        self._call, self._metrics, self._model, self._processor = call, metrics, model, processor
        self._started = time.perf_counter()
        self._answer: Answer | None = None
        self._last: Chunk | None = None
        self._failed = False

    async def prepare(self, pictures: Pictures) -> None:
        """Decode the images, and check the schema, in other threads.

        Raises:
            ApiError: an image cannot be used.
            PromptError: the schema cannot be used.
        """
        for where, part in self._call.images.items():
            try:
                part["image"] = await pictures.for_model(part["image"], self._processor)
            except ImageError as error:
                raise image_error(error, where) from error
        options = self._call.options
        if options["schema"] is not None:  # caches the check for the engine
            await pictures.check(
                lambda: Constraint.of(options["schema"], None, None, options["stop"])
            )

    async def respond(self, engine: Engine) -> Response:
        """Begin the answer; an invalid request raises before the response begins."""
        self._answer = engine.answer(self._call.request())
        first = await self._next()
        self._metrics.first_token(time.perf_counter() - self._started)
        objects = ChatObjects(
            self._model,
            self._processor.tokenizer,
            with_logprobs=self._call.options["logprobs"] is not None,
        )
        if self._call.stream:
            return EventStream(self._events(first, objects))
        chunks = [first]
        while chunks[-1].finish_reason is None:
            chunks.append(await self._next())
        return JSONResponse(objects.completion(chunks))

    def close(self) -> None:
        """Give up an unfinished answer, and record metrics."""
        if self._answer is None:
            return
        self._answer.close()
        last = self._last
        reason = last.finish_reason if last is not None else None
        if reason is None:
            reason = "error" if self._failed else "cancelled"
        self._metrics.answer(reason, None if last is None else last.stats)

    async def _next(self) -> Chunk:
        assert self._answer is not None
        try:
            chunk = await self._answer.next()
        except Exception:
            self._failed = True
            raise
        self._last = chunk
        if chunk.finish_reason == "error":
            assert chunk.error is not None
            raise chunk.error
        return chunk

    async def _events(self, chunk: Chunk, objects: ChatObjects) -> AsyncIterator[str]:
        # If the last object has the usage, the others have a null.
        no_usage: dict[str, Any] = {"usage": None} if self._call.include_usage else {}
        yield json.dumps(objects.first_delta() | no_usage)
        try:
            while True:
                if objects.is_worth_sending(chunk):
                    yield json.dumps(objects.delta(chunk) | no_usage)
                if chunk.finish_reason is not None:
                    break
                chunk = await self._next()
        except Exception as error:  # noqa: BLE001 (the status is sent already)
            self._report(error)
            yield json.dumps(to_api_error(error).body())
            return
        yield json.dumps(objects.last_delta(chunk.finish_reason) | no_usage)
        if self._call.include_usage:
            yield json.dumps(objects.usage_chunk(chunk.stats))
        yield "[DONE]"
