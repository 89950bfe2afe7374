"""One training run from data to a folder that can be served: started, stopped, gone on with."""

import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from app.model_card import Preprocessing
from model_export import augment, checkpoints, dataset, decoded, recipe, train_model, train_report
from model_export.dataset import Listing
from model_export.decoded import Pictures, Skipped
from model_export.errors import ExportError
from model_export.labels import check as check_labels
from model_export.recipe import Recipe
from model_export.run_folder import RECIPE, RunFolder
from model_export.signals import signals_collected
from model_export.trainer import Trainer
from model_export.update import multiplies_bfloat16

_DRAW_SECONDS = 60  # curves take about a second to draw, short epochs less than that to train
_SHOW_SECONDS = 0.5  # reading the loss makes a GPU and this thread wait for each other
_SHOWN = 10  # skipped files named on the screen; all of them are in skipped.txt


@dataclass(frozen=True)
class Request:
    """What to train on, where to, and how."""

    data: Path
    output: Path
    config: Path | None
    flags: dict[str, Any]  # numbers of the recipe that the command line sets
    val_split: float | None
    resume: bool
    threads: int
    compile: bool


def train(request: Request) -> int | None:
    """Run to the end, or to a signal; return the signal's number, if any.

    Raises:
        ExportError: the data, the recipe or the run folder does not allow it.
    """
    if request.threads < 1:
        raise ExportError(f"--threads {request.threads}: expected 1 or more")
    torch.set_num_threads(request.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    listing = dataset.find(request.data)
    check_labels(listing.classes)  # what it ends in is to be converted
    if request.resume:
        folder = RunFolder(request.output, resume=True)
        state = folder.load_state()
        rules = _resumed_recipe(request, state)
    else:
        state = None
        rules = recipe.load(request.config, request.flags)
    share = (state or {}).get("val_split") if request.val_split is None else request.val_split
    listing = _with_test(listing, share, rules)
    if state is None:
        folder = RunFolder(request.output, resume=False)
        if request.config and request.config.resolve() == (request.output / RECIPE).resolve():
            raise ExportError(f"--config {request.config}: would be overwritten; choose another -o")
        model, preprocessing = train_model.build(rules, len(listing.classes))
    else:
        _check_same(request, listing, state, bfloat16=multiplies_bfloat16(device))
        kept = checkpoints.load(str(request.output), allow_zero_head=True)
        model, preprocessing = kept.model.train(), kept.preprocessing
    skipped = (state or {}).get("skipped")  # states of older versions do not tell
    pictures = _decode(request, listing, rules, preprocessing, folder, skipped)
    trainer = Trainer(rules, model, preprocessing, *pictures[:2], device, request.compile)
    if state is not None:
        trainer.restore(state["trainer"])
    folder.write(RECIPE, recipe.to_toml(rules))
    facts = {
        "recipe": recipe.to_toml(rules),
        "data": listing.digest(),
        "skipped": [one.name for one in pictures[2]],
        "val_split": share,
        "threads": request.threads,
        "compile": request.compile,
        "bfloat16": trainer.update.bfloat16,
    }
    about = train_report.About(
        request.data.name, listing.classes, len(pictures[0]), len(pictures[1]), pictures[2], share
    )
    try:
        return _loop(trainer, folder, facts, about)
    except KeyboardInterrupt:  # the second one, or one while the result is written
        raise KeyboardInterrupt(
            "stopped at once; --resume goes on with what was saved last"
        ) from None


def _loop(
    trainer: Trainer, folder: RunFolder, facts: dict[str, Any], about: train_report.About
) -> int | None:
    drawn = time.monotonic()
    shown = 0.0

    def save() -> None:
        trainer.check_weights()
        folder.write_model(trainer.average, trainer.preprocessing, about.classes)
        folder.write_metrics(trainer.history)
        folder.save_state({**facts, "trainer": trainer.state()})  # last: what it needs is there

    with signals_collected() as caught, _bar(trainer) as bar:
        if trainer.step == 0:
            save()  # whatever ends the first epoch early, --resume goes on
        while trainer.step < trainer.steps:
            trainer.take_step()
            bar.update(trainer.batch)
            if not bar.disable and time.monotonic() - shown > _SHOW_SECONDS:
                loss, accuracy = trainer.running.means()
                bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.1%}", refresh=False)
                shown = time.monotonic()
            if trainer.step % trainer.epoch_steps == 0:
                trainer.finish_epoch()
                bar.set_description_str(f"epoch {trainer.epoch + 1}/{trainer.recipe.epochs}")
                _say(_line(trainer), sys.stdout)
                save()
                if time.monotonic() - drawn > _DRAW_SECONDS:
                    train_report.draw_curves(trainer.history, folder)
                    drawn = time.monotonic()
            if caught:
                break
        save()
    measured = trainer.measure()  # the weights that were just kept
    train_report.write(trainer, measured, folder, about)
    if caught and trainer.step < trainer.steps:
        _say(
            f"mixer-train: stopped in epoch {trainer.epoch + 1} after step {trainer.step}; "
            "all is saved, --resume goes on",
            sys.stderr,
        )
        return caught[0]
    _say(
        f"{folder.path}: accuracy {measured.accuracy:.2%} on {len(trainer.test):,} test pictures; "
        f"mixer-export convert {folder.path} -o model.onnx makes it servable",
        sys.stdout,
    )
    return None


def _resumed_recipe(request: Request, state: dict[str, Any]) -> Recipe:
    """Return the run's own recipe; flags and --config may repeat it, but not change it."""
    saved = Recipe.model_validate(tomllib.loads(state["recipe"]))
    if request.flags or request.config is not None:
        given = recipe.read(request.config) | request.flags
        asked = recipe.check(saved.model_dump(exclude_unset=True) | given)
        for name in sorted(given):
            if getattr(asked, name) != getattr(saved, name):
                raise ExportError(
                    f"--resume: the run has {name} {getattr(saved, name)}, not "
                    f"{getattr(asked, name)}; start another run with another -o"
                )
    return saved


def _check_same(
    request: Request, listing: Listing, state: dict[str, Any], *, bfloat16: bool
) -> None:
    """Refuse other data; warn where the arithmetic would round differently."""
    if state["data"] != listing.digest():
        raise ExportError(f"--resume: {request.data} has not the pictures that the run began with")
    now = {"threads": request.threads, "compile": request.compile, "bfloat16": bfloat16}
    for name, value in now.items():
        if state[name] != value:
            sys.stderr.write(
                f"mixer-train: the run began with {name} {state[name]}, and goes on with "
                f"{value}: sums round differently, so it is no exact repetition\n"
            )


def _with_test(listing: Listing, share: float | None, rules: Recipe) -> Listing:
    if listing.test:
        if share is not None:
            raise ExportError(f"--val-split: {listing.path} has pictures to test on already")
        return listing
    if share is None:
        raise ExportError(
            f"{listing.path} has no test/ or val/ beside train/: --val-split 0.1 would set a tenth "
            "of each class aside to measure on"
        )
    return dataset.split(listing, share, rules.seed)


def _decode(
    request: Request,
    listing: Listing,
    rules: Recipe,
    preprocessing: Preprocessing,
    folder: RunFolder,
    before: list[str] | None,
) -> tuple[Pictures, Pictures, list[Skipped]]:
    side = preprocessing.image_size
    stored = augment.stored_side(side, rules)
    whole = {"image_size": stored, "patch_size": stored, "crop_fraction": 1.0}
    train, test, skipped = decoded.load(
        listing,
        preprocessing.model_copy(update=whole),
        preprocessing.model_copy(update={"patch_size": side}),
        folder.path,
        request.threads,
    )
    if before is not None:
        decoded.check_skipped(before, skipped)
    if skipped:
        lines = [f"{one.name}: {one.reason}" for one in skipped]
        folder.write("skipped.txt", "\n".join(lines) + "\n")
        more = [f"… and {len(lines) - _SHOWN} more, all in {folder.path / 'skipped.txt'}"]
        shown = lines[:_SHOWN] + (more if len(lines) > _SHOWN else [])
        sys.stderr.write("".join(f"mixer-train: skipped {line}\n" for line in shown))
    if not len(test):
        raise ExportError(f"{listing.path}: holds no readable picture to test on")
    return train, test, skipped


def _line(trainer: Trainer) -> str:
    last = trainer.history[-1]
    return (
        f"epoch {trainer.epoch}/{trainer.recipe.epochs}: "
        f"train loss {last['train_loss']:.4f}, accuracy {last['train_accuracy']:.2%}; "
        f"test loss {last['test_loss']:.4f}, accuracy {last['test_accuracy']:.2%}; "
        f"{last['images_per_second']:.0f} images/s"
    )


def _say(line: str, stream: TextIO) -> None:
    """Write a line above the progress bar, at once: a log file shows how far a long run is."""
    tqdm.write(line, file=stream)
    stream.flush()


def _bar(trainer: Trainer) -> "tqdm[Any]":
    return tqdm(
        total=trainer.steps * trainer.batch,
        initial=trainer.step * trainer.batch,
        desc=f"epoch {trainer.epoch + 1}/{trainer.recipe.epochs}",
        unit="img",
        unit_scale=True,
        leave=False,
        disable=None,
    )
