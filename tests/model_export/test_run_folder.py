"""What the folder of a run survives: a full disk, and whoever else is at work there."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from model_export.train import main

from .train_data import MILD, QUICK, write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data set of three classes, 8 pictures each to train on and 8 to test on."""
    return write_images(tmp_path_factory.mktemp("images") / "colors", 8)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let no file of this process grow larger: a write fails as it does where the disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_is_one_line(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A state that does not fit on the disk ends the run with a line that names its file."""
    run = tmp_path / "run"
    large = ["--hidden", "128", "--channel-mlp", "256"]  # tensors that torch writes by themselves
    with files_of_at_most(700_000):
        assert main([str(images), "-o", str(run), *QUICK, *MILD, *large]) == 1
    assert capsys.readouterr().err == f"mixer-train: [Errno 27] File too large: '{run}/state.pt'\n"
