"""HTTP/1.1 connections with timeouts and a maximum number, which uvicorn leaves to a proxy."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError


class BoundedProtocol(H11Protocol):
    """A connection with timeouts for sending each request head and reading each response."""

    header_s: float
    write_s: float
    max_connections: int
    _header_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Accept a connection, unless there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            transport.abort()
            return
        # `pause_writing` is then called as soon as the client leaves any data unread.
        transport.set_write_buffer_limits(high=0)
        self._watch_header()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timers."""
        self._cancel("_header_timer")
        self._cancel("_write_timer")
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Process data from the client."""
        super().data_received(data)
        self._watch_header()

    def on_response_complete(self) -> None:
        """Continue with data received meanwhile, perhaps part of a request head."""
        super().on_response_complete()
        if self.conn.trailing_data[0]:
            self._watch_header()

    def _watch_header(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._cancel("_header_timer")
        elif self._header_timer is None:
            self._header_timer = self.loop.call_later(self.header_s, self.transport.abort)

    def pause_writing(self) -> None:
        """Start the timer: the client does not read its response."""
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.write_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Cancel the timer: the client reads again."""
        super().resume_writing()
        self._cancel("_write_timer")

    def _cancel(self, name: str) -> None:
        timer = getattr(self, name)
        if timer is not None:
            timer.cancel()
            setattr(self, name, None)

    def send_400_response(self, msg: str) -> None:
        """Answer malformed HTTP with a JSON error, or disconnect if a response has begun."""
        response = ApiError(400, msg).response()
        headers = [*response.raw_headers, (b"connection", b"close")]
        try:
            for event in (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=bytes(response.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:
            self.transport.abort()
        else:
            self.transport.close()


def bounded_protocol(
    header_s: float, write_s: float, max_connections: int
) -> type[BoundedProtocol]:
    """Return a protocol class with these limits, for uvicorn's `http` option."""
    limits = {"header_s": header_s, "write_s": write_s, "max_connections": max_connections}
    return type("LimitedProtocol", (BoundedProtocol,), limits)
