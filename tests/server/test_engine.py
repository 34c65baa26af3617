"""The engine without an HTTP server."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from live_server import SlowBatch

from mlx_fastvlm.generation.answer import Chunk
from mlx_fastvlm.generation.request import Request
from mlx_fastvlm.server.engine import Batch, Engine
from mlx_fastvlm.server.errors import ApiError
from mlx_mobileclip.errors import CheckpointError, PromptError


def run(
    new_batch: Callable[[], Batch], test: Callable[[Engine], Coroutine[Any, Any, None]]
) -> None:
    async def body() -> None:
        engine = Engine(new_batch, asyncio.get_running_loop())
        try:
            await test(engine)
        finally:
            engine.stop()
            assert engine.join(5)

    asyncio.run(asyncio.wait_for(body(), 20))


def test_functions_run_in_the_engine_thread_between_steps() -> None:
    batch = SlowBatch()

    async def test(engine: Engine) -> None:
        answer = engine.answer(Request("Hi", max_tokens=1000))
        await answer.next()
        names = [await engine.call(lambda: threading.current_thread().name) for _ in range(3)]
        assert names == ["engine"] * 3
        with pytest.raises(ZeroDivisionError):
            await engine.call(lambda: 1 // 0)
        assert (await answer.next()).text == "x"
        answer.close()

    run(lambda: batch, test)
    assert batch.removed == [1]


def test_function_of_a_cancelled_caller_is_skipped() -> None:
    ran: list[int] = []

    async def test(engine: Engine) -> None:
        answer = engine.answer(Request("Hi", max_tokens=1000))
        await answer.next()
        calls = [
            asyncio.ensure_future(engine.call(lambda i=i: ran.append(i)))  # type: ignore[misc]
            for i in range(2)
        ]
        await asyncio.sleep(0)
        calls[1].cancel()
        await calls[0]
        await answer.next()
        assert ran == [0]

    run(lambda: SlowBatch(step_s=0.1), test)


class RefusingBatch(SlowBatch):
    def add(self, request: Request) -> int:
        raise PromptError("too long")


def test_invalid_request() -> None:
    async def test(engine: Engine) -> None:
        with pytest.raises(PromptError, match="too long"):
            await engine.answer(Request("Hi")).next()

    run(RefusingBatch, test)


def test_error_while_loading() -> None:
    def load() -> Batch:
        raise CheckpointError("no such directory")

    async def test(engine: Engine) -> None:
        with pytest.raises(CheckpointError, match="no such directory"):
            await engine.ready

    run(load, test)


class ExitingBatch(SlowBatch):
    def step(self) -> list[tuple[int, Chunk]]:
        raise SystemExit


def test_unexpected_end_of_the_thread() -> None:
    async def test(engine: Engine) -> None:
        answer = engine.answer(Request("Hi"))
        with pytest.raises(ApiError, match="shutting down"):
            await answer.next()
        with pytest.raises(SystemExit):
            await engine.ended  # resolved after the answers have failed

    run(ExitingBatch, test)


def test_stop_fails_unfinished_answers() -> None:
    async def test(engine: Engine) -> None:
        answer = engine.answer(Request("Hi", max_tokens=1000))
        await answer.next()
        engine.stop()
        with pytest.raises(ApiError, match="shutting down"):
            while True:
                await answer.next()
        await engine.ended

    run(SlowBatch, test)
