"""Run the server: listen, load the models, and shut down gracefully."""

import argparse
import asyncio
import logging
import os
import signal
import socket
import time
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from mlx_mobileclip.checkpoints.hub import DEMO
from mlx_mobileclip.cpu.process import slow_blas_remedy
from mlx_mobileclip.errors import ModelError
from mlx_mobileclip.terminal import INTERRUPTED, hide_download_progress, progress, say

from .app import App
from .engine import Batch, Engine
from .models import Models, load_models, served_name
from .protocol import bounded_protocol
from .security import is_loopback
from .settings import KEY_VARIABLE, Settings

KEEP_ALIVE_S = 30
END_S = 5.0  # after draining, for the last responses and the engine's step
GRACE_S = 2  # for connections to close
EXIT_STATUSES: dict[int | None, int] = {signal.SIGTERM: 0, signal.SIGINT: INTERRUPTED}

QUOTING_WARNINGS = "text |the prompt holds"  # regex: these quote client input


def run(args: argparse.Namespace) -> None:
    """Serve until a signal arrives; `args` are those of `command.build_parser`.

    Raises:
        ModelError: an option, the address or a model cannot be used.
        KeyboardInterrupt: SIGINT ended the server.
    """
    if args.quiet:
        hide_download_progress()
    listener = listen(args.host, args.port)
    try:
        settings = read_settings(args, listener.getsockname()[0])
        asyncio.run(_serve(args, settings, listener))
    finally:
        listener.close()


def listen(host: str, port: int) -> socket.socket:
    """Listen on an address; raises ModelError if that fails."""
    try:
        [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(128)  # reserves the port before the models load
        except OSError:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ModelError(
            f"cannot listen on port {port} of {host[:80]} ({reason}); choose another with --port "
            "or --host"
        ) from error
    return listener


def read_settings(args: argparse.Namespace, address: str) -> Settings:
    """Read the settings from options; raises ModelError if a required key is missing."""
    key = os.environ.get(KEY_VARIABLE) if args.api_key is None else args.api_key
    if key is not None and (not key or not key.isascii() or not key.isprintable() or " " in key):
        raise ModelError(
            "the API key must be printable ASCII without spaces; choose another for --api-key"
        )
    if key is None and not is_loopback(address):
        raise ModelError(
            f"others can reach {address}, so a key is required; set {KEY_VARIABLE} or --api-key"
        )
    names = {args.host.lower(), *(name.lower() for name in args.allow_host)}
    return Settings(
        api_key=key,
        hosts=frozenset(names),
        max_batch=args.max_batch,
        max_queue=args.max_queue,
        max_tokens=args.max_tokens,
        max_images=args.max_images,
        max_body_bytes=args.max_body << 20,
        drain_s=args.drain,
        page=args.ui,
    )


class Loader:
    """Loads the models in the engine's thread, and creates its batches.

    Attributes:
        models: The models, once they are loaded.
    """

    def __init__(self, load: Callable[[], Models]):
        self.models: Models | None = None
        self._load = load

    def __call__(self) -> Batch:
        """Load the models if necessary, and create a batch."""
        if self.models is None:
            self.models = self._load()
        return self.models.new_batch()


class GracefulServer(uvicorn.Server):
    """Lets running answers finish after a signal, while new requests get 503.

    Attributes:
        signal: The signal that ended the server.
    """

    def __init__(self, config: uvicorn.Config, app: App, drain_s: float):
        super().__init__(config)
        self.signal: int | None = None
        self._app, self._drain_s, self._deadline = app, drain_s, 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, and exit at once at the second."""
        if self.signal is None:
            self.signal = sig
            self._app.is_draining = True
            self._deadline = time.monotonic() + self._drain_s
        else:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Exit when no requests remain; after the deadline, stop running answers with an error."""
        if self.signal is not None:
            late_s = time.monotonic() - self._deadline
            if late_s > 0:
                self._app.end_answers()
            if not self._app.active or late_s > END_S:
                self.should_exit = True
        return await super().on_tick(counter)


def make_server(app: App, settings: Settings) -> GracefulServer:
    """Create the HTTP server with the limits of the settings."""
    config = uvicorn.Config(
        app,
        interface="asgi3",
        http=bounded_protocol(settings.header_s, settings.write_s, settings.max_connections),
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        log_level="critical",  # `App` reports errors, and requests are not logged
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
    )
    return GracefulServer(config, app, settings.drain_s)


async def _serve(args: argparse.Namespace, settings: Settings, listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_report)
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of disconnected clients
    clip = args.clip_model or (DEMO if args.model == DEMO else None)
    app = App(settings, served_name(args.model), clip and served_name(clip), debug=args.debug)
    server = make_server(app, settings)
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    loader = Loader(
        lambda: load_models(
            args.model, clip, revision=args.revision, dtype=args.dtype, max_batch=args.max_batch
        )
    )
    engine = Engine(loader, loop)
    try:
        with progress(f"loading {args.model}", quiet=args.quiet) as set_status:
            await asyncio.wait((serving, engine.ready), return_when=asyncio.FIRST_COMPLETED)
            if engine.ready.done():
                engine.ready.result()
                set_status(f"loaded {args.model}" + (f" and {clip}" if clip else ""))
        if loader.models is not None and engine.ready.done():
            warnings.filterwarnings("ignore", message=QUOTING_WARNINGS)
            app.begin(engine, loader.models)
            _greet(args, listener)
        await asyncio.wait((serving, engine.ended), return_when=asyncio.FIRST_COMPLETED)
        if engine.ended.done():
            engine.ended.result()
        await serving
    finally:
        server.should_exit = True
        engine.stop()
        await asyncio.wait((serving,))
        app.close()
        if not engine.join(END_S):  # a model is still loading, for example
            os._exit(EXIT_STATUSES.get(server.signal, 1))
    if server.signal == signal.SIGINT:
        raise KeyboardInterrupt


def _greet(args: argparse.Namespace, listener: socket.socket) -> None:
    if args.quiet:
        return
    if remedy := slow_blas_remedy():
        say(f"note: {remedy}")
    host = f"[{args.host}]" if ":" in args.host else args.host
    say(f"serving at http://{host}:{listener.getsockname()[1]}/v1; press Ctrl-C to stop")


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Report in one line an error that asyncio would print as a traceback."""
    error = context.get("exception")
    say(f"error: {context['message']}" + (f" ({type(error).__name__})" if error else ""))
