"""Read untrusted request bodies, with limits on size, time and complexity."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, NoReturn

from starlette.requests import Request

from .errors import ApiError, bad
from .fields import Fields

MAX_VALUES = 300_000  # counts commas and brackets: `[],[],[]` takes 30 times its size in Python
MAX_BODIES = 4  # bodies of the maximum size that may be read at the same time


class BodyReader:
    """Reads the JSON bodies of all requests, within a shared memory limit."""

    def __init__(self, max_bytes: int, seconds: float):
        """Allow bodies of `max_bytes`, which must arrive within `seconds`."""
        self._max_bytes, self._seconds = max_bytes, seconds
        self._left = MAX_BODIES * max_bytes

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[Fields]:
        """Read a body; its memory counts until the end of the `with` block.

        Raises:
            ApiError: the body is too large, too slow, or not a JSON object.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # browsers send other types cross-origin without a preflight
            raise ApiError(415, "the content type must be application/json")
        with self._account() as account:
            try:
                async with asyncio.timeout(self._seconds):
                    data = await self._receive(request, account)
            except TimeoutError:
                message = f"the body took more than {self._seconds:.0f} s; send it faster"
                raise ApiError(408, message) from None
            yield Fields(parse_json(data))

    @contextmanager
    def _account(self) -> Iterator["_Account"]:
        account = _Account()
        try:
            yield account
        finally:
            self._left += account.bytes

    async def _receive(self, request: Request, account: "_Account") -> bytearray:
        stated = request.headers.get("content-length", "")
        if stated.isascii() and stated.isdigit() and int(stated[:20]) > self._max_bytes:
            self._raise_too_large()
        data = bytearray()
        async for block in request.stream():
            self._left -= len(block)
            account.bytes += len(block)
            if self._left < 0:
                message = "too many large requests at the same time; try again"
                raise ApiError(429, message, headers={"Retry-After": "1"})
            data += block
            if len(data) > self._max_bytes:
                self._raise_too_large()
        return data

    def _raise_too_large(self) -> NoReturn:
        raise ApiError(
            413, f"the body is larger than {self._max_bytes / (1 << 20):g} MB; send smaller images"
        )


class _Account:
    """Number of body bytes that a request holds in memory."""

    bytes = 0


def parse_json(data: bytes | bytearray) -> Any:
    """Parse strict JSON: UTF-8, no NaN, duplicate keys or lone surrogates, limited complexity."""
    if sum(data.count(mark) for mark in b"[{,") > MAX_VALUES:
        raise bad(f"the body has more than {MAX_VALUES} values; send fewer at a time")
    try:
        text = data.decode()
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
        if "\\u" in text:  # may be a lone surrogate
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeError as error:
        raise bad(f"the body is not valid Unicode ({error.reason})") from error  # type: ignore[attr-defined]
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)[:200]
        raise bad(f"the body is not valid JSON ({reason})") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
