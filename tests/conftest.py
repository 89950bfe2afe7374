"""Fixtures: the service around a fake engine, and the data beside the checkout."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from tests.fakes import FakeEngine
from tests.processes import Server, serving

ROOT = Path(__file__).parent.parent
Serve = Callable[..., TestClient]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Return a function that starts the service around an engine, with settings."""
    with ExitStack() as stack:

        def start(engine: FakeEngine | None = None, **settings: object) -> TestClient:
            app = create_app(Settings.model_validate(settings), engine or FakeEngine())
            return stack.enter_context(TestClient(app, raise_server_exceptions=False))

        yield start


@pytest.fixture
def client(serve: Serve) -> TestClient:
    """Return a client of the service with default settings."""
    return serve()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of data sets beside the checkout, or skip."""
    folder = ROOT.parent / "shared"
    if not (folder / "data" / "photos.tar").is_file():
        pytest.skip("the data sets beside the checkout (../shared) are absent")
    return folder


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Return a running server of the embedded model."""
    with serving(tmp_path_factory.mktemp("live") / "log") as server:
        yield server
