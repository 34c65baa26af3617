import base64
from collections.abc import Callable, Iterator

import pytest
from live_server import SCENE, LiveServer

from mlx_fastvlm.server.models import Models, load_models

Starter = Callable[..., LiveServer]


@pytest.fixture(scope="session")
def models() -> Models:
    return load_models("demo", "demo")


@pytest.fixture(scope="session")
def server(models: Models) -> Iterator[LiveServer]:
    """One server, shared by tests that do not change it."""
    live = LiveServer(models)
    yield live
    live.close()


@pytest.fixture
def start(models: Models) -> Iterator[Starter]:
    """Start servers with other settings or another batch."""
    running: list[LiveServer] = []

    def start_server(*args: object, **options: object) -> LiveServer:
        running.append(LiveServer(models, *args, **options))  # type: ignore[arg-type]
        return running[-1]

    yield start_server
    for live in running:
        live.close()


@pytest.fixture(scope="session")
def scene() -> str:
    """The scene as a data URI."""
    return "data:image/png;base64," + base64.b64encode(SCENE.read_bytes()).decode()
