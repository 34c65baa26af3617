"""The ASGI application: routes and what they share."""

import asyncio
import time
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from mlx_mobileclip.errors import ModelError
from mlx_mobileclip.terminal import say

from . import embeddings
from .body import BodyReader
from .chat import read_chat
from .clip import Clip
from .completions import Completion
from .engine import Engine
from .errors import ApiError, to_api_error
from .exchange import ClientGoneError, Exchange
from .fields import Fields
from .metrics import CONTENT_TYPE, Metrics
from .models import Models
from .page import page_routes
from .pictures import Pictures
from .security import check_access
from .settings import Settings

Handler = Callable[[Request], Awaitable[Response]]
ClipEndpoint = Callable[[Fields, Clip, Metrics, str, int], Awaitable[Any]]


class App:
    """An ASGI application.

    Attributes:
        active: Requests in progress, except those for health and metrics.
        is_draining: Whether new requests are refused because the server is shutting down.
    """

    def __init__(
        self, settings: Settings, model_name: str, clip_name: str | None, *, debug: bool = False
    ):
        self.active = 0
        self.is_draining = False
        self._settings, self._debug = settings, debug
        self._model_name, self._clip_name = model_name, clip_name
        self._metrics, self._pictures = Metrics(), Pictures()
        self._bodies = BodyReader(settings.max_body_bytes, settings.body_s)
        self._slots = settings.max_batch + settings.max_queue
        self._taken = 0
        self._created = int(time.time())
        self._engine: Engine | None = None
        self._models: Models | None = None
        self._clip: Clip | None = None
        routes = [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/embeddings", self._clip_endpoint(embeddings.embed), methods=["POST"]),
            Route("/v1/classify", self._clip_endpoint(embeddings.classify), methods=["POST"]),
            Route("/v1/models", self._list_models),
            Route("/v1/models/{name:path}", self._show_model),
            Route("/health", self._health),
            Route("/metrics", self._show_metrics),
        ]
        if settings.page:
            routes += page_routes()
        self._paths = {route.path for route in routes}
        self._router = Router(routes, redirect_slashes=False)

    def begin(self, engine: Engine, models: Models) -> None:
        """Start answering requests with the loaded models."""
        self._engine, self._models = engine, models
        if models.clip is not None:
            self._clip = Clip(*models.clip, engine, self._pictures)

    def end_answers(self) -> None:
        """Stop the engine; running answers end with an error."""
        if self._engine is not None:
            self._engine.stop()

    def close(self) -> None:
        """Stop the threads that decode images."""
        self._pictures.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; exceptions become error responses in OpenAI's format."""
        if scope["type"] != "http":
            return
        scope["app"] = self  # makes the router raise on unknown paths
        exchange = scope["exchange"] = Exchange(scope, receive, send)
        path = scope["path"]
        counted = path not in ("/health", "/metrics")
        self.active += counted
        try:
            await exchange.run(self._respond)
        except ClientGoneError:
            pass
        except asyncio.CancelledError:  # the server is shutting down
            if exchange.status is None:
                error = ApiError(503, "the server is shutting down")
                await error.response()(scope, receive, exchange.send)
            raise
        finally:
            self.active -= counted
            if exchange.status is not None:
                label = path if path in self._paths else "other"
                self._metrics.request(label, exchange.status)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            check_access(Headers(scope=scope), scope["path"], self._settings)
            await self._router(scope, receive, send)
        except HTTPException as error:
            await _routing_error(scope, error).response()(scope, receive, send)
        except ClientGoneError:
            raise
        except Exception as error:
            self._report(error)
            if scope["exchange"].status is not None:  # the response has begun
                raise ClientGoneError from error
            await to_api_error(error).response()(scope, receive, send)

    def _report(self, error: Exception) -> None:
        """Report an internal error, without text that could quote a prompt."""
        if isinstance(error, ApiError) or to_api_error(error).status < 500:
            return
        if isinstance(error, ModelError):
            say(f"error: {error}")
        elif self._debug:
            say("".join(traceback.format_exception(error)).rstrip(), keep="\n")
        else:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"
            say(
                f"error: a request failed with {type(error).__name__} at {where} (start the server "
                "with --debug for the traceback)"
            )

    def _take_slot(self, exchange: Exchange) -> None:
        """Take a slot until the exchange ends; raises ApiError if all are taken."""
        if self._taken >= self._slots:
            raise ApiError(
                429,
                f"all {self._slots} request slots are taken; try again",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )
        self._taken += 1

        def release() -> None:
            self._taken -= 1

        exchange.at_end(release)

    def _ready(self) -> tuple[Engine, Models]:
        if self.is_draining:
            raise ApiError(503, "the server is shutting down", headers={"Connection": "close"})
        if self._engine is None or self._models is None:
            raise ApiError(503, "the models are still loading", headers={"Retry-After": "5"})
        return self._engine, self._models

    def _check_model(self, body: Fields, name: str | None, what: str) -> None:
        given = body.text("model")
        if name is None:
            raise ApiError(
                400,
                f"this server has no model for {what}; its operator can add one with --clip-model",
                param="model",
                code="model_not_found",
            )
        if given != name:
            raise ApiError(
                400,
                f"the model {given[:60]!r} does not exist here; for {what} it is {name!r}",
                param="model",
                code="model_not_found",
            )

    async def _chat(self, request: Request) -> Response:
        engine, models = self._ready()
        exchange: Exchange = request.scope["exchange"]
        async with self._bodies.read(request) as body:
            self._check_model(body, self._model_name, "chat")
            call = read_chat(body, self._settings)
            self._take_slot(exchange)
            completion = Completion(
                call, self._metrics, self._model_name, models.processor, self._report
            )
            exchange.at_end(completion.close)
            await completion.prepare(self._pictures)
        del body
        return await completion.respond(engine)

    def _clip_endpoint(self, endpoint: ClipEndpoint) -> Handler:
        async def handle(request: Request) -> Response:
            self._ready()
            async with self._bodies.read(request) as body:
                self._check_model(body, self._clip_name, "embeddings and labels")
                assert self._clip is not None and self._clip_name is not None
                self._take_slot(request.scope["exchange"])
                max_images = self._settings.max_images
                return JSONResponse(
                    await endpoint(body, self._clip, self._metrics, self._clip_name, max_images)
                )

        return handle

    def _model_objects(self) -> list[dict[str, Any]]:
        names = dict.fromkeys(name for name in (self._model_name, self._clip_name) if name)
        return [
            {"id": name, "object": "model", "created": self._created, "owned_by": "mlx-fastvlm"}
            for name in names
        ]

    async def _list_models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": self._model_objects()})

    async def _show_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        for model in self._model_objects():
            if model["id"] == name:
                return JSONResponse(model)
        message = f"the model {name[:60]!r} does not exist here"
        raise ApiError(404, message, param="model", code="model_not_found")

    async def _health(self, request: Request) -> Response:
        status = "ok" if self._engine is not None else "loading"
        status = "shutting down" if self.is_draining else status
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    async def _show_metrics(self, request: Request) -> Response:
        running = min(self._taken, self._settings.max_batch)
        text = self._metrics.text(running, self._taken - running)
        return Response(text, headers={"Content-Type": CONTENT_TYPE})


def _routing_error(scope: Scope, error: HTTPException) -> ApiError:
    method, path = scope["method"][:20], scope["path"][:60]
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        headers = {"Allow": allowed}
        return ApiError(405, f"{method} is not allowed for {path}; use {allowed}", headers=headers)
    return ApiError(error.status_code, f"no such path: {path}")
