"""What the exporter's tests share: the fixtures' folder and the command, run in this process."""

import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from model_export.cli import main

FIXTURES = Path(__file__).parents[1] / "fixtures"

Convert = Callable[..., Path]


@pytest.fixture
def labels(tmp_path: Path) -> Callable[[int], Path]:
    """Return a maker of label files of a given length."""

    def write(count: int) -> Path:
        path = tmp_path / f"{count}.txt"
        path.write_text("".join(f"class {i}\n" for i in range(count)))
        return path

    return write


@pytest.fixture
def convert(tmp_path: Path, labels: Callable[[int], Path]) -> Convert:
    """Return `mixer-export convert`: source, number of classes, further flags -> the ONNX file."""

    def run(source: Path | str, classes: int, *flags: str) -> Path:
        output = tmp_path / "model.onnx"
        command = ["convert", str(source), "-o", str(output), "--labels", str(labels(classes))]
        assert main([*command, *flags]) == 0
        return output

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return Google's tiny Mixer, exported once for all tests that only look at it."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "labels.txt").write_text("".join(f"class {i}\n" for i in range(7)))
    command = ["convert", str(FIXTURES / "google_tiny.npz"), "-o", str(folder / "tiny.onnx")]
    assert main([*command, "--labels", str(folder / "labels.txt")]) == 0
    return folder / "tiny.onnx"


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """Return a folder of real photos, or None on a machine that has none."""
    archive = Path(__file__).parents[3] / "shared" / "data" / "photos.tar"
    if not archive.is_file():
        return None
    folder = tmp_path_factory.mktemp("photos")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return next(folder.rglob("*.JPEG")).parent
