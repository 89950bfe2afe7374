"""Where the results go: a table, JSON lines or CSV; and which of them are there already."""

import csv
import io
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TextIO

from pydantic import FiniteFloat

OutputFormat = Literal["table", "jsonl", "csv"]


class OtherModelError(Exception):
    """The file holds results of another model, of another number of labels, or something else."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """One label and its score."""

    label: str
    index: int
    score: FiniteFloat


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one file."""

    path: str
    model: str  # name@version
    predictions: list[Prediction] = field(default_factory=list)
    error: str | None = None


class Writer(Protocol):
    """Takes results as they come; `close` after the last one."""

    def write(self, result: Result) -> None:
        """Take one result."""
        ...

    def close(self) -> None:
        """Write what was kept until the end."""
        ...


# Control characters, other line ends, and what turns the direction of text.
_STEERING = (range(32), range(127, 160), range(0x2028, 0x202F), range(0x2066, 0x206A))
_HARMLESS = dict.fromkeys(itertools.chain.from_iterable(_STEERING), "\ufffd")


def printable(text: str) -> str:
    """Return `text` without what would steer a terminal: labels and details may be a stranger's."""
    return text.translate(_HARMLESS)


class TableWriter:
    """Aligned columns, once all results are known, in the order of the files."""

    def __init__(self, stream: TextIO, order: Sequence[str]) -> None:
        self._stream = stream
        self._order = {path: place for place, path in enumerate(order)}
        self._results: list[Result] = []

    def write(self, result: Result) -> None:
        """Keep one result."""
        self._results.append(result)

    def close(self) -> None:
        """Write the table."""
        width = max((len(result.path) for result in self._results), default=0)
        for result in sorted(self._results, key=lambda one: self._order[one.path]):
            labels = "  ".join(f"{p.label} {p.score:.1%}" for p in result.predictions)
            line = printable(f"{result.path:<{width}}  {result.error or labels}")
            self._stream.write(f"{line}\n")
        self._stream.flush()


class JsonLinesWriter:
    """One object a line, as soon as it is known."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, result: Result) -> None:
        """Write one line."""
        members = {name: value for name, value in asdict(result).items() if value not in (None, [])}
        self._stream.write(json.dumps(members) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Nothing is kept."""


class CsvWriter:
    """One row a file, as soon as it is known: path, model, label_1, score_1, …, error."""

    def __init__(self, stream: TextIO, top_k: int, *, with_header: bool) -> None:
        self._stream = stream
        self._top_k = top_k
        if with_header:
            self._stream.write(_csv_row(_csv_header(top_k)))

    def write(self, result: Result) -> None:
        """Write one row."""
        cells: list[Any] = [c for p in result.predictions for c in (p.label, f"{p.score:.6g}")]
        cells += [""] * (2 * self._top_k - len(cells))
        self._stream.write(_csv_row([result.path, result.model, *cells, result.error or ""]))
        self._stream.flush()

    def close(self) -> None:
        """Nothing is kept."""


def finished(file: Path, output_format: OutputFormat, model: str, top_k: int) -> set[str]:
    """Return the paths whose results `file` holds, and leave only those in it.

    Failures and a last line that was cut off are taken out, to be done again.

    Raises:
        OtherModelError: the results are another model's, or of more or fewer labels, or there is
            something else in the file.
    """
    if output_format == "table" or not file.exists():
        return set()
    file = file.resolve()  # a link stays one
    with file.open(encoding="utf-8", errors="surrogateescape", newline="") as stream:
        text = stream.read()
    kept, paths = [], set()
    whole = text[: text.rfind("\n") + 1]
    begun = _csv_row(_csv_header(top_k)) if output_format == "csv" else '{"path": "'
    try:
        if not whole and not begun.startswith(text[: len(begun)]):
            raise ValueError("no line of ours was cut off there")
        rows = list(_json_rows(whole) if output_format == "jsonl" else _csv_rows(whole))
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error):
        raise OtherModelError(f"{file} holds no results in {output_format}") from None
    for row in rows:
        if row.model not in (None, model):
            raise OtherModelError(f"{file} holds results of {row.model}, not of {model}")
        if row.labels not in (None, top_k):
            raise OtherModelError(f"{file} was made with another --top-k")
        if not row.has_failed:
            kept.append(row.text)
            paths.update([] if row.path is None else [row.path])
    clean = file.with_name(file.name + ".part")
    clean.write_text("".join(kept), "utf-8", "surrogateescape", newline="")
    os.replace(clean, file)  # noqa: PTH105 - whole or not at all, as Path.replace, and it reads so
    return paths


@contextmanager
def open_writer(
    file: Path | None, output_format: OutputFormat, top_k: int, order: Sequence[str]
) -> Iterator[Writer]:
    """Write to `file`, after what it holds, or to standard output."""
    with ExitStack() as stack:
        stream: TextIO = sys.stdout
        if isinstance(stream, io.TextIOWrapper):  # as a file: names need not be UTF-8
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")
        if file is not None:
            mode: Literal["w", "a"] = "w" if output_format == "table" else "a"
            stream = stack.enter_context(
                file.open(mode, encoding="utf-8", errors="surrogateescape", newline="")
            )
        with_header = file is None or file.stat().st_size == 0
        writer = _writer(stream, output_format, top_k, order, with_header=with_header)
        stack.callback(writer.close)  # a table shows what was done, broken off or not
        yield writer


def _writer(
    stream: TextIO,
    output_format: OutputFormat,
    top_k: int,
    order: Sequence[str],
    *,
    with_header: bool,
) -> Writer:
    if output_format == "table":
        return TableWriter(stream, order)
    if output_format == "jsonl":
        return JsonLinesWriter(stream)
    return CsvWriter(stream, top_k, with_header=with_header)


class _Row(NamedTuple):
    """What one line of a file says; a header has only labels, a failure none."""

    text: str
    path: str | None = None
    model: str | None = None
    labels: int | None = None
    has_failed: bool = False


def _json_rows(text: str) -> Iterator[_Row]:
    for line in text.splitlines(keepends=True):
        if not line.strip():
            continue
        members = json.loads(line)
        has_failed = "error" in members
        labels = None if has_failed else len(members["predictions"])
        yield _Row(line, members["path"], members["model"], labels, has_failed)


def _csv_rows(text: str) -> Iterator[_Row]:
    """Yield the rows that are whole; one that was cut off in a quoted name counts as none."""
    rows = csv.reader(io.StringIO(text, newline=""))
    header = next(rows, None)
    if header is None:
        return
    labels = (len(header) - 3) // 2
    if header != _csv_header(labels):
        raise ValueError("another header")
    yield _Row(_csv_row(header), labels=labels)
    for cells in rows:
        if len(cells) == len(header):
            has_failed = cells[-1] != ""
            yield _Row(_csv_row(cells), cells[0], cells[1], None, has_failed)


def _csv_header(top_k: int) -> list[str]:
    pairs = [f"{name}_{n}" for n in range(1, top_k + 1) for name in ("label", "score")]
    return ["path", "model", *pairs, "error"]


def _csv_row(cells: Sequence[Any]) -> str:
    """Return one line; Python's csv does not quote a carriage return, but takes it for an end."""
    row = io.StringIO()
    has_return = any("\r" in str(cell) for cell in cells)
    csv.writer(
        row, lineterminator="\n", quoting=csv.QUOTE_ALL if has_return else csv.QUOTE_MINIMAL
    ).writerow(cells)
    return row.getvalue()
