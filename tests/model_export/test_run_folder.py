"""What the folder of a run survives: a full disk, and whoever else is at work there."""

import errno
import fcntl
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from model_export import cli, train_model, trainer
from model_export.train import main

from .train_data import MILD, QUICK, picture, write_images


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


@pytest.mark.parametrize(
    ("module", "name", "flags"),
    [(train_model, "build", [*QUICK, *MILD]), (trainer.Trainer, "take_step", ["--resume"])],
)
def test_two_runs_in_one_folder(
    module: object,
    name: str,
    flags: list[str],
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """While a run is at work another is refused in its folder, with a state there and without."""
    run, work = str(tmp_path / "run"), getattr(module, name)
    codes: list[int | None] = []

    def meanwhile(*arguments: object) -> object:
        if not codes:
            codes.append(None)  # else the second one would begin a third
            codes[0] = main([str(images), "-o", run, *flags])
        return work(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, meanwhile)
        assert main([str(images), "-o", run, *QUICK, *MILD]) == 0
    assert codes == [1]
    said = f"mixer-train: {run}: another run is at work there; wait until it ends, or choose"
    assert said in capsys.readouterr().err
    assert main([str(images), "-o", run, "--resume", "--no-compile", "--threads", "1"]) == 0
    assert cli.main(["convert", run, "-o", str(tmp_path / "m.onnx")]) == 0


def test_file_system_without_locks(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing can be locked a run goes on all the same."""
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks")))
    assert main([str(images), "-o", str(tmp_path / "run"), *QUICK, *MILD]) == 0


def test_other_pictures_can_be_read(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run does not go on where a skipped file was repaired, or a picture broke: it would differ.

    States that do not tell what was skipped are gone on with.
    """
    data = Path(shutil.copytree(images, tmp_path / "data"))
    odd, good = data / "train" / "red" / "000.png", data / "test" / "blue" / "001.png"
    odd.write_bytes(b"no picture")
    run, resume = tmp_path / "run", ["--resume", "--no-compile", "--threads", "1"]
    assert main([str(data), "-o", str(run), *QUICK, *MILD]) == 0
    assert main([str(data), "-o", str(run), *resume]) == 0
    before = (run / "skipped.txt").read_text()
    for path, said in (
        (odd, "the run skipped a file that can be read by now, train/red/000.png; put the old"),
        (good, "the run began with a picture that cannot be read any longer, test/blue/001.png;"),
    ):
        kept = path.read_bytes()
        path.write_bytes(picture(0, 1) if path == odd else b"broken")
        capsys.readouterr()
        assert main([str(data), "-o", str(run), *resume]) == 1
        told = capsys.readouterr().err
        assert told.startswith(f"mixer-train: --resume: {said}")
        assert told.count("\n") == 1
        path.write_bytes(kept)
    assert (run / "skipped.txt").read_text() == before
    state = torch.load(run / "state.pt", weights_only=True)
    assert state.pop("skipped") == ["train/red/000.png"]
    torch.save(state, run / "state.pt")
    odd.write_bytes(picture(0, 1))
    assert main([str(data), "-o", str(run), *resume]) == 0
