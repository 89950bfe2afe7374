"""`mixer-train`: what a run learns, leaves behind, survives and refuses."""

import csv
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from model_export import cli, decoded, trainer
from model_export.evaluate import evaluate
from model_export.train import main

from .conftest import FIXTURES
from .train_data import CLASSES, MILD, QUICK, write_images, write_tar

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 120  # of a process; on a quiet machine one takes 5 s


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data set of three classes, 16 pictures each to train on and 16 to test on."""
    return write_images(tmp_path_factory.mktemp("images") / "colors", 16)


@pytest.fixture(scope="session")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run."""
    output = tmp_path_factory.mktemp("runs") / "run"
    assert main([str(images), "-o", str(output), *QUICK, *MILD]) == 0
    return output


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return mixer-train where it must fail: arguments -> its one line."""

    def run(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 1
        text = capsys.readouterr().err
        assert text.startswith("mixer-train: ")
        assert text.count("\n") == 1
        return text

    return run


def metrics(run: Path) -> list[dict[str, str]]:
    """Return the epochs of a run without what depends on the clock."""
    with (run / "metrics.csv").open() as file:
        epochs = list(csv.DictReader(file))
    return [{k: v for k, v in epoch.items() if "second" not in k} for epoch in epochs]


def test_run_learns(run: Path) -> None:
    """Three epochs tell three colors apart, and metrics.csv has a line for each."""
    epochs = metrics(run)
    assert [epoch["epoch"] for epoch in epochs] == ["1", "2", "3"]
    assert float(epochs[-1]["test_accuracy"]) >= 0.9
    assert float(epochs[-1]["train_loss"]) < float(epochs[0]["train_loss"])


def test_run_feeds_convert(run: Path, images: Path, tmp_path: Path) -> None:
    """The run becomes a servable file without any flag, and is as accurate there as it said."""
    model = tmp_path / "colors.onnx"
    assert cli.main(["convert", str(run), "-o", str(model)]) == 0
    served = evaluate(model, images, 1)
    assert served.card.labels == CLASSES
    assert f"{served.top1:.6g}" == metrics(run)[-1]["test_accuracy"]


def test_model_card_states_data_recipe_accuracy_limits(run: Path) -> None:
    """model_card.md has the counts, every number of the recipe and what the model cannot do."""
    card = (run / "model_card.md").read_text()
    assert "48 pictures to train on, 48 to test on" in card
    assert (run / "recipe.toml").read_text() in card
    assert f"**{float(metrics(run)[-1]['test_accuracy']):.2%}**" in card
    assert "## Limits" in card
    assert "| class | accuracy | test pictures |" in card
    assert "| red | " in card
    assert str(run.parent) not in card


@pytest.mark.parametrize("name", ["curves.png", "confusion.png"])
def test_drawings_are_pictures(run: Path, name: str) -> None:
    """The curves and the confusion matrix are PNG files with something on them."""
    with Image.open(run / name) as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 10


def test_state_holds_nothing_executable(run: Path) -> None:
    """state.pt loads with weights_only, so it can hold tensors and plain values alone."""
    state = torch.load(run / "state.pt", weights_only=True)
    assert state["trainer"]["step"] == 9


def test_recipe_repeats_the_run(run: Path, images: Path, tmp_path: Path) -> None:
    """A run from another run's recipe.toml ends with the same weights."""
    again = tmp_path / "again"
    recipe = ["--config", str(run / "recipe.toml"), "--no-compile", "--threads", "1"]
    assert main([str(images), "-o", str(again), *recipe]) == 0
    weights = "model.safetensors"
    assert (again / weights).read_bytes() == (run / weights).read_bytes()


# Every kind of randomness is on: a lost random state would show. Muon has two optimizers' state.
LONG = [*QUICK, "--epochs", "16", "--cutmix", "0.5", "--optimizer", "muon"]


@pytest.fixture(scope="session")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that nothing interrupted."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    assert main([str(images), "-o", str(output), *LONG]) == 0
    return output


def test_killed_run_resumes_exactly(whole: Path, images: Path, tmp_path: Path) -> None:
    """A run that is killed (SIGKILL) and resumed ends with the weights of an unharmed one."""
    killed = tmp_path / "killed"
    script = (
        "import os, signal, sys\n"
        "from model_export import train, trainer\n"
        "take_step = trainer.Trainer.take_step\n"
        "def step_or_die(self):\n"
        "    if self.step == 4:\n"  # of three an epoch
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    take_step(self)\n"
        "trainer.Trainer.take_step = step_or_die\n"
        "train.main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", script, str(images), "-o", str(killed), *LONG]
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False, timeout=TIMEOUT_S
    )
    assert done.returncode == -signal.SIGKILL
    assert len(metrics(killed)) == 1
    assert main([str(images), "-o", str(killed), *LONG, "--resume"]) == 0
    weights = "model.safetensors"
    assert (killed / weights).read_bytes() == (whole / weights).read_bytes()
    assert metrics(killed) == metrics(whole)


def test_run_killed_in_its_first_epoch_resumes(
    whole: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ends before its first epoch does goes on, too, to the same weights."""

    def die(_: trainer.Trainer) -> None:
        raise OSError("the machine is gone")

    killed = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "take_step", die)
        assert main([str(images), "-o", str(killed), *LONG]) == 1
    assert main([str(images), "-o", str(killed), *LONG, "--resume"]) == 0
    weights = "model.safetensors"
    assert (killed / weights).read_bytes() == (whole / weights).read_bytes()


def test_diverged_run_keeps_what_it_had(
    run: Path, images: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    """A run whose loss is no number any more ends with one line, and no such weights are kept."""
    output = tmp_path / "run"
    assert "diverged" in refusal(images, "-o", output, *QUICK, "--lr", "1e38")
    assert metrics(output) == []


def test_interrupt_of_a_diverged_epoch(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ctrl+C after weights have become no numbers saves none of them over the last epoch's."""
    take_step = trainer.Trainer.take_step

    def interrupted(self: trainer.Trainer) -> None:
        take_step(self)
        if self.step == 4:  # in the middle of the second epoch of 3 steps
            with torch.no_grad():
                next(self.average.parameters()).fill_(math.nan)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(trainer.Trainer, "take_step", interrupted)
    assert main([str(images), "-o", str(tmp_path / "run"), *LONG]) == 1
    assert "after step 4 the weights are no numbers: the run has" in capsys.readouterr().err
    kept = load_file(tmp_path / "run" / "model.safetensors")
    assert all(weight.isfinite().all() for weight in kept.values())
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["trainer"]["step"] == 3


def test_interrupt_while_decoding(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ctrl+C before training has begun is one line and the usual exit code."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(decoded, "load", interrupted)
    assert main([str(images), "-o", str(tmp_path / "run"), *QUICK]) == 130
    assert "before anything was trained" in capsys.readouterr().err


@pytest.mark.parametrize("share", ["0", "-1", "1", "1.5", "nan"])
def test_share_to_measure_on_is_a_share(
    share: str, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    """A --val-split that is no share between 0 and 1 is refused."""
    data = write_images(tmp_path / "data", 4, ("",))
    said = refusal(data, "-o", tmp_path / "run", *QUICK, f"--val-split={share}")
    assert "expected a share between 0 and 1" in said


def test_classes_of_any_name(tmp_path: Path) -> None:
    """A name that would be mathematics to the drawing library is drawn as it stands."""
    data = write_images(tmp_path / "data", 4, ("",))
    (data / "red").rename(data / "a$_$b")
    output = tmp_path / "r$_$un"
    arguments = [str(data), "-o", str(output), *QUICK, *MILD, "--epochs", "1"]
    assert main([*arguments, "--val-split", "0.25"]) == 0
    card = (output / "model_card.md").read_text()
    assert "a$_$b" in card
    assert "--config recipe.toml --val-split 0.25` repeats" in card


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_finishes_the_step_and_saves(
    number: signal.Signals,
    code: int,
    whole: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A signal in the middle of an epoch ends the run after its step, and nothing is lost."""
    take_step = trainer.Trainer.take_step

    def interrupted(self: trainer.Trainer) -> None:
        if self.step == 4:  # in the middle of the second epoch of 3 steps
            signal.raise_signal(number)
        take_step(self)

    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "take_step", interrupted)
        assert main([str(images), "-o", str(stopped), *LONG]) == code
    state = torch.load(stopped / "state.pt", weights_only=True)
    assert state["trainer"]["step"] == 5
    assert state["trainer"]["running"]["images"] == 32
    assert main([str(images), "-o", str(stopped), "--resume", *LONG]) == 0
    weights = "model.safetensors"
    assert (stopped / weights).read_bytes() == (whole / weights).read_bytes()
    assert metrics(stopped) == metrics(whole)


def test_second_ctrl_c_ends_at_once(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A second Ctrl+C does not wait for the step, and says that what was saved can be resumed."""

    def interrupted(self: trainer.Trainer) -> None:
        del self
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(trainer.Trainer, "take_step", interrupted)
    # A test run in the background ignores Ctrl+C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main([str(images), "-o", str(tmp_path / "run"), *LONG]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    said = capsys.readouterr().err
    assert "mixer-train: stopped at once; --resume goes on with what was saved last" in said


def test_large_data_lies_in_a_file(
    run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures beyond the limit on memory lie on disk, teach the same, and leave nothing there."""
    monkeypatch.setattr(decoded, "MEMORY_BYTES", 0)
    output = tmp_path / "run"
    assert main([str(images), "-o", str(output), *QUICK, *MILD]) == 0
    weights = "model.safetensors"
    assert (output / weights).read_bytes() == (run / weights).read_bytes()
    assert {path.name for path in output.iterdir()} == {path.name for path in run.iterdir()}


@pytest.mark.parametrize("suffix", ["tar", "xz", "gz"])
def test_tar_is_the_same_data(suffix: str, run: Path, images: Path, tmp_path: Path) -> None:
    """A run on a tar of the folder, compressed or not, ends with the same weights."""
    archive = write_tar(images, tmp_path / f"colors.{suffix}")
    output = tmp_path / "run"
    assert main([str(archive), "-o", str(output), *QUICK, *MILD]) == 0
    weights = "model.safetensors"
    assert (output / weights).read_bytes() == (run / weights).read_bytes()


def test_val_split_sets_pictures_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], refusal: Callable[..., str]
) -> None:
    """Without a test split a share of each class is set aside, and asked for where it is not."""
    images = write_images(tmp_path / "plain", 10, splits=("",))
    assert "--val-split" in refusal(images, "-o", tmp_path / "run", *QUICK)
    command = [str(images), "-o", str(tmp_path / "run"), *QUICK, "--val-split", "0.2"]
    assert main(command) == 0
    assert "on 6 test pictures" in capsys.readouterr().out


def test_unreadable_images_are_listed_and_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that is no picture is named, listed in skipped.txt and left out."""
    images = write_images(tmp_path / "colors", 8)
    (images / "train" / "red" / "000.png").write_bytes(b"not a picture")
    assert main([str(images), "-o", str(tmp_path / "run"), *QUICK]) == 0
    assert "skipped train/red/000.png" in capsys.readouterr().err
    assert (tmp_path / "run" / "skipped.txt").read_text().startswith("train/red/000.png: ")
    assert "23 pictures to train on" in (tmp_path / "run" / "model_card.md").read_text()


def test_class_without_pictures_is_refused(tmp_path: Path, refusal: Callable[..., str]) -> None:
    """A class whose folder is empty, or holds nothing readable, is refused by its name."""
    images = write_images(tmp_path / "colors", 2)
    (images / "train" / "violet").mkdir()
    assert "class violet has no pictures" in refusal(images, "-o", tmp_path / "run", *QUICK)
    (images / "train" / "violet" / "notes.txt").write_text("to do")
    process = [sys.executable, "-m", "model_export.train", str(images), "-o", str(tmp_path / "run")]
    done = subprocess.run(
        [*process, *QUICK], cwd=ROOT, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )
    assert done.returncode == 1
    assert "class violet has no readable picture" in done.stderr.splitlines()[-1]


def test_impossible_data_is_refused(tmp_path: Path, refusal: Callable[..., str]) -> None:
    """Nothing there, an empty folder, one class and a broken tar each get a line of their own."""
    output = ("-o", tmp_path / "run")
    assert "no such folder or tar" in refusal(tmp_path / "absent", *output)
    (tmp_path / "empty").mkdir()
    assert "is empty" in refusal(tmp_path / "empty", *output)
    (tmp_path / "one" / "cat").mkdir(parents=True)
    (tmp_path / "one" / "cat" / "a.png").write_bytes(b"")
    assert "two or more classes, found cat" in refusal(tmp_path / "one", *output)
    (tmp_path / "broken.tar.xz").write_bytes(b"\xfd7zXZ\x00 no more")
    assert "not a readable folder or tar" in refusal(tmp_path / "broken.tar.xz", *output)


def test_class_that_no_answer_could_name_is_refused(
    images: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    """A class's name that could not be converted is refused before anything is trained."""
    data = shutil.copytree(images, tmp_path / "data")
    for split in ("train", "test"):
        (data / split / CLASSES[0]).rename(data / split / "a\tb")
    assert "control character" in refusal(data, "-o", tmp_path / "run", *QUICK)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] data. DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
    ],
)
def test_too_little_memory(
    error: Exception, monkeypatch: pytest.MonkeyPatch, refusal: Callable[..., str]
) -> None:
    """Too little memory for a recipe is one line that says what needs less."""
    monkeypatch.setattr("model_export.train_run.train", Mock(side_effect=error))
    assert "a smaller --batch-size" in refusal("photos", "-o", "run")


def test_other_errors_are_bugs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any other error of torch keeps its traceback."""
    monkeypatch.setattr("model_export.train_run.train", Mock(side_effect=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["photos", "-o", "run"])


def test_runs_are_not_mixed_up(run: Path, images: Path, refusal: Callable[..., str]) -> None:
    """An existing run is not overwritten, nor resumed with other numbers or other pictures."""
    assert "--resume goes on with it" in refusal(images, "-o", run, *QUICK)
    again = ("-o", run, "--resume")
    assert "epochs 3, not 4" in refusal(images, *again, "--epochs", "4")
    assert "min_lr 0.0, not 0.005" in refusal(images, *again, "--min-lr", "0.005")
    assert "holds no run" in refusal(images, "-o", images, "--resume")


def test_models_are_not_overwritten(
    run: Path, images: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    """A folder with a model of no run is not written to, nor a recipe that is read from there."""
    model = shutil.copytree(FIXTURES / "timm_mixer_tiny", tmp_path / "model")
    before = {file.name: file.read_bytes() for file in model.iterdir()}
    said = refusal(images, "-o", model, "--init", model, "--no-compile")
    assert f"{model} holds model.safetensors, which is of no run that was cut short" in said
    assert {file.name: file.read_bytes() for file in model.iterdir()} == before
    finished = shutil.copytree(run, tmp_path / "finished", ignore=lambda *_: ["state.pt"])
    assert "holds model.safetensors" in refusal(images, "-o", finished, *QUICK)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("# mine\n" + (run / "recipe.toml").read_text())
    assert "would be overwritten" in refusal(images, "-o", tmp_path, "--config", recipe)
    assert recipe.read_text().startswith("# mine\n")


def test_run_that_was_killed_as_it_began_may_begin_anew(
    run: Path, images: Path, tmp_path: Path
) -> None:
    """What a run leaves that never saved its state keeps nobody from starting it again."""
    begun = shutil.copytree(
        run, tmp_path / "begun", ignore=lambda *_: ["state.pt", "model_card.md"]
    )
    assert main([str(images), "-o", str(begun), *QUICK, *MILD]) == 0
    assert metrics(begun) == metrics(run)


def test_resume_with_other_sums_is_told(
    run: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Going on with another number of threads is no exact repetition, and the line says so."""
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # for the other tests
    again = shutil.copytree(run, tmp_path / "run")
    command = [str(images), "-o", str(again), "--resume", "--no-compile", "--threads", "2"]
    assert main(command) == 0
    assert "began with threads 1, and goes on with 2" in capsys.readouterr().err


def test_resume_needs_the_same_pictures(
    run: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    """Resuming on a data set with one picture less is refused."""
    fewer = write_images(tmp_path / "colors", 15)
    assert "has not the pictures" in refusal(fewer, "-o", run, "--resume")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--image-size", "30"], "not a multiple of 4"),
        (["--image-size", "1056"], "less than or equal to 1024"),
        (["--variant", "S/16", "--hidden", "64"], "variant fixes the model's dimensions"),
        (["--lr", "-1"], "lr -1.0: Input should be greater than 0"),
        (["--min-lr", "1"], "min_lr 1 is above lr 0.001"),
        (["--crop-shift", "4"], "crop_area 1 is none"),
        (["--lr", "inf"], "lr inf: Input should be a finite number"),
        (["--val-split", "0.5"], "has pictures to test on already"),
        (["--threads", "0"], "--threads 0: expected 1 or more"),
    ],
)
def test_impossible_recipe_is_refused(
    flags: list[str], said: str, images: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    """A number that cannot be is refused by its name before anything is written."""
    assert said in refusal(images, "-o", tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def test_unknown_key_of_a_recipe_is_refused(
    images: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    """A key that no recipe has, a slip of the pen, is named."""
    config = tmp_path / "recipe.toml"
    config.write_text("epoch = 3\n")
    assert "recipe: epoch" in refusal(images, "-o", tmp_path / "run", "--config", config)


@pytest.mark.parametrize(
    "source", ["google_tiny.npz", "timm_mixer_tiny", "timm_gmixer_tiny", "timm_resmlp_tiny"]
)
def test_checkpoint_is_fine_tuned(source: str, images: Path, tmp_path: Path) -> None:
    """A foreign checkpoint, a relative's too, gets a head for these classes and learns them."""
    output = tmp_path / "run"
    quick = ["--init", str(FIXTURES / source), "--epochs", "2", "--warmup-epochs", "0"]
    quick += ["--lr", "0.003", "--ema", "0.5", "--batch-size", "8", "--no-compile"]
    command = [str(images), "-o", str(output), "--threads", "1", *quick, *MILD]
    assert main(command) == 0
    assert main([*command, "--resume"]) == 0  # the very command, as a script repeats it
    assert float(metrics(output)[-1]["test_accuracy"]) >= 0.6
    assert cli.main(["convert", str(output), "-o", str(tmp_path / "m.onnx")]) == 0


def test_other_resolution_is_refused_with_the_reason(
    images: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    """Fine-tuning at another resolution is refused, since token mixing fixes the token count."""
    init = ("--init", FIXTURES / "google_tiny.npz", "--image-size", "96")
    assert "one weight per pair of tokens" in refusal(images, "-o", tmp_path / "run", *init)


def test_run_can_be_fine_tuned(run: Path, images: Path, tmp_path: Path) -> None:
    """A run's own folder is a checkpoint to start another run from."""
    quick = ["--init", str(run), "--epochs", "1", "--no-compile", "--threads", "1"]
    assert main([str(images), "-o", str(tmp_path / "next"), *quick]) == 0


def test_training_without_a_compiler_is_loud(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Where torch.compile fails, training goes on and says that it takes longer, and why."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no C++ compiler\nand much more")

    monkeypatch.setattr(torch, "compile", broken)
    flags = [flag for flag in QUICK if flag != "--no-compile"]
    assert main([str(images), "-o", str(tmp_path / "run"), *flags]) == 0
    assert "about twice as long (no C++ compiler)" in capsys.readouterr().err
