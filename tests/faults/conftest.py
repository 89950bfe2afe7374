"""Fixtures: servers to attack, images to attack them with, and a place for the figures."""

import resource
import tarfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.processes import Server, serving

Start = Callable[..., AbstractContextManager[Server]]
Figure = Callable[[str], None]


@pytest.fixture(autouse=True, scope="session")
def _many_descriptors() -> None:
    """Let the tests open as many connections as the system allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@pytest.fixture
def figure(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Figure:
    """Return a function that prints what was measured, whatever pytest captures."""

    def show(text: str) -> None:
        with capsys.disabled():
            print(f"\n    {request.node.name}: {text}", end="", flush=True)

    return show


@pytest.fixture
def real(tmp_path: Path) -> Start:
    """Return a function that serves the embedded model, with settings as flags."""

    def start(**settings: object) -> AbstractContextManager[Server]:
        return serving(tmp_path / "log", *_flags(settings), module="tests.faults.observed")

    return start


@pytest.fixture
def fake(tmp_path: Path) -> Start:
    """Return a function that serves a fake engine of `batch_ms` a batch."""

    def start(
        batch_ms: float = 0, classes: int = 3, **settings: object
    ) -> AbstractContextManager[Server]:
        return serving(
            tmp_path / "log",
            *_flags(settings),
            module="tests.faults.observed",
            OBSERVED_BATCH_MS=str(batch_ms),
            OBSERVED_CLASSES=str(classes),
        )

    return start


@pytest.fixture(scope="session")
def photos(shared: Path) -> list[bytes]:
    """Return a hundred real photos."""
    with tarfile.open(shared / "data" / "photos.tar") as archive:
        return list(_files(archive))[:100]


@pytest.fixture(scope="session")
def hostile(shared: Path) -> list[bytes]:
    """Return every file of the corpus of odd, truncated, corrupt and hostile images."""
    with tarfile.open(shared / "data" / "hostile-images.tar.xz") as archive:
        return list(_files(archive))


def _files(archive: tarfile.TarFile) -> Iterator[bytes]:
    for member in archive:
        file = archive.extractfile(member) if member.isfile() else None
        if file is not None:
            yield file.read()


def _flags(settings: dict[str, object]) -> list[str]:
    return [word for k, v in settings.items() for word in (f"--{k.replace('_', '-')}", str(v))]
