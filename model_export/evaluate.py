"""Measure a model file on labeled pictures, through the pipeline that serves it."""

import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from app.errors import Problem
from app.images import decode
from app.model_card import ModelCard
from model_export.errors import ExportError
from model_export.pictures import MAX_PIXELS, Entry, ImageFolder
from model_export.session import open_engine

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_DRAWN = 1000  # classes in a drawing: a matrix of more takes gigabytes and shows nothing
_BATCH = 32
_SYNSET = re.compile(r"n[0-9]{8}")
_TOP = 5


@dataclass(frozen=True)
class Evaluation:
    """What a model got right."""

    card: ModelCard
    answers: Counter[tuple[int, int]]  # pictures by (true class, answer)
    top5: float | None  # None where five guesses are nearly all of the classes
    refused: tuple[str, ...]  # pictures that the server would answer with an error
    left_out: tuple[str, ...]  # files in the folders of the classes that have no picture's name
    by_order: bool  # folders were matched to labels by their order, not by their names
    seconds: float
    split: str  # the folder of the data set that was measured, "" if it is the whole

    @property
    def pictures(self) -> int:
        """Count the pictures that got an answer."""
        return self.answers.total()

    @property
    def top1(self) -> float:
        """Share of pictures whose best class is the true one."""
        return sum(n for (truth, best), n in self.answers.items() if truth == best) / self.pictures

    @property
    def per_class(self) -> dict[int, tuple[float, int]]:
        """Return top-1 accuracy and number of pictures of each class that has any, in order."""
        counts: Counter[int] = Counter()
        for (truth, _), n in self.answers.items():
            counts[truth] += n
        return {c: (self.answers[c, c] / counts[c], counts[c]) for c in sorted(counts)}


def evaluate(model: Path, data: Path, threads: int) -> Evaluation:
    """Classify every picture of `data`, an ImageFolder or a tar of one, with a progress bar.

    Raises:
        ExportError: the model or the data cannot be read, or their classes do not match.
    """
    engine = open_engine(model)
    pictures = ImageFolder(data)
    labels = engine.card.labels
    indices, by_order = _match(pictures.folders, labels)
    named = _first(labels)
    merged = np.array([i if by_order else named[label] for i, label in enumerate(labels)])
    answers: Counter[tuple[int, int]] = Counter()
    in_top = 0
    refused: list[str] = []
    start = time.perf_counter()
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=len(pictures), unit="img", leave=False, disable=None) as bar,
    ):
        for entries in _batches(pictures):
            decoded = list(pool.map(lambda entry: _patches(entry, engine.card), entries))
            bar.update(len(entries))
            good = [patches for patches in decoded if patches is not None]
            refused += [e.name for e, p in zip(entries, decoded, strict=True) if p is None]
            if not good:
                continue
            logits = engine.run(np.stack(good))  # [batch, classes]
            kept = [e for e, p in zip(entries, decoded, strict=True) if p is not None]
            truth = np.array([indices[entry.folder] for entry in kept])  # [batch]
            best = merged[np.argsort(-logits, axis=1, kind="stable")[:, :_TOP]]  # [batch, 5]
            answers.update(zip(truth.tolist(), best[:, 0].tolist(), strict=True))
            in_top += int((best == truth[:, None]).any(axis=1).sum())
    seconds = time.perf_counter() - start
    if not answers:
        raise ExportError(f"{data}: no picture could be decoded")
    top5 = in_top / answers.total() if len(labels) > _TOP else None
    return Evaluation(
        engine.card,
        answers,
        top5,
        tuple(refused),
        tuple(pictures.left_out),
        by_order,
        seconds,
        pictures.split,
    )


def plot_confusion(evaluation: Evaluation, path: Path) -> None:
    """Draw the confusion matrix, of at most `MAX_DRAWN` classes, into a PNG."""
    classes = len(evaluation.card.labels)
    confusion = np.zeros((classes, classes), np.int64)
    for cell, pictures in evaluation.answers.items():
        confusion[cell] = pictures
    title = f"{evaluation.card.name}: {evaluation.top1:.2%}"
    figure = draw_confusion(confusion, evaluation.card.labels, title)
    figure.savefig(path, format="png", dpi=120)


def draw_confusion(confusion: NDArray[np.int64], labels: tuple[str, ...], title: str) -> "Figure":
    """Draw counts [classes, classes], true class by answer, colored by share of the true class."""
    from matplotlib.figure import Figure  # only here: it is slow to import

    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    side = 8.0
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="answer", ylabel="truth")
    axes.set_title(title, parse_math=False)  # names may hold a $
    if len(labels) <= 30:  # more names would not be legible
        axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right", parse_math=False)
        axes.set_yticks(range(len(labels)), labels, parse_math=False)
        for row, column in np.ndindex(*shares.shape):
            color = "white" if shares[row, column] > 0.5 else "black"
            count = str(confusion[row, column])
            axes.text(column, row, count, ha="center", va="center", color=color, fontsize=8)
    return figure


def _match(folders: list[str], labels: tuple[str, ...]) -> tuple[dict[str, int], bool]:
    """Find each folder's class: by name, or by order where no name fits but the count does.

    A folder's place is that of its name among the others: labels in another order are no labels of
    such folders, unless those are WordNet's numbers, by which ImageNet's labels are ordered.
    """
    named = _first(labels)
    unknown = [folder for folder in folders if folder not in named]
    if not unknown:
        return {folder: named[folder] for folder in folders}, False
    is_ordered = all(map(_SYNSET.fullmatch, folders)) or list(labels) == sorted(labels)
    if len(unknown) == len(folders) == len(labels) and is_ordered:
        return {folder: index for index, folder in enumerate(folders)}, True
    raise ExportError(
        f"folder {unknown[0]} is none of the model's {len(labels)} labels ({labels[0]}, …)"
    )


def _first(labels: tuple[str, ...]) -> dict[str, int]:
    """Map each label to the first class of that name.

    ImageNet calls two of its classes crane: a folder of that name holds both, and either is right.
    """
    return {label: index for index, label in reversed([*enumerate(labels)])}


def _batches(pictures: ImageFolder) -> Iterator[list[Entry]]:
    entries = iter(pictures)
    while batch := list(islice(entries, _BATCH)):
        yield batch


def _patches(entry: Entry, card: ModelCard) -> NDArray[np.uint8] | None:
    try:
        return decode(entry.data, card.preprocessing, MAX_PIXELS).patches
    except Problem:
        return None
