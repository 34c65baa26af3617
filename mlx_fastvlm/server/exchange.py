"""One request and its response; cancelled when the client disconnects."""

import asyncio
from collections.abc import Callable
from contextlib import ExitStack

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

DRAIN_S, DRAIN_BYTES = 5.0, 64 << 20  # limits on reading an unused body before closing


class ClientGoneError(Exception):
    """The client disconnected before its request was answered."""


class Exchange:
    """Runs an ASGI application for one request.

    Attributes:
        status: Status of the response; None before it begins.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send):
        self.status: int | None = None
        self._scope, self._receive, self._send = scope, receive, send
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0").strip()
        self._has_body = length != "0" or "transfer-encoding" in headers
        self._body_read = asyncio.Event()  # only then can a disconnect be awaited
        self._is_empty = not self._has_body
        if self._is_empty:
            self._body_read.set()
        self._is_complete = False
        self._at_end = ExitStack()

    def at_end(self, function: Callable[[], object]) -> None:
        """Call a function when the exchange ends, also after an error."""
        self._at_end.callback(function)

    async def run(self, app: ASGIApp) -> None:
        """Run the application; it is cancelled if the client disconnects.

        Raises:
            ClientGoneError: the client disconnected.
        """
        with self._at_end:
            work = asyncio.ensure_future(app(self._scope, self.receive, self.send))
            gone = asyncio.ensure_future(self._wait_for_disconnect())
            try:
                await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            finally:
                is_done = work.done()
                for task in (work, gone):
                    task.cancel()
                await asyncio.wait((work, gone))
            if not is_done:
                raise ClientGoneError
            work.result()

    async def receive(self) -> Message:
        """Return the next part of the body; after the last one, wait forever."""
        if self._is_empty:
            self._is_empty = False
            return {"type": "http.request", "body": b"", "more_body": False}
        if self._body_read.is_set():
            await asyncio.Event().wait()
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        if not message.get("more_body", False):
            self._body_read.set()
        return message

    async def send(self, message: Message) -> None:
        """Send a part of the response; if the body was not read, close the connection after it."""
        is_unread = self._has_body and not self._body_read.is_set()
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if is_unread:
                message["headers"] = [*message["headers"], (b"connection", b"close")]
        elif is_unread and not message.get("more_body", False):
            # Closing while the client still sends could discard the response.
            await self._send({**message, "more_body": True})
            if self.status != 408:  # the rest of the body will not come
                await self._drain()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._is_complete = True
        await self._send(message)

    async def _drain(self) -> None:
        left = DRAIN_BYTES
        try:
            async with asyncio.timeout(DRAIN_S):
                while left > 0:
                    message = await self._receive()
                    left -= len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return
        except TimeoutError:
            return

    async def _wait_for_disconnect(self) -> None:
        await self._body_read.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if self._is_complete:  # uvicorn also reports a disconnect after a response
            await asyncio.Event().wait()
