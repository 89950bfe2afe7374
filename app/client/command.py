"""The command `mixer-classify`: arguments, progress, exit code."""

import argparse
import asyncio
import logging
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, Self

from app.arguments import UNREAD, Arguments, drop_output, number_within, prepare_streams
from app.client.errors import ImageError, ServerError
from app.client.files import NothingFoundError, find_images
from app.client.results import (
    OtherModelError,
    Prediction,
    Result,
    Writer,
    finished,
    open_writer,
    printable,
)

ALL_GOOD, SOME_FAILED, USELESS, INTERRUPTED = 0, 1, 2, 130
_HOST_AND_PORT = re.compile(r"[\w.-]+:\d+(/.*)?")


class Backend(Protocol):
    """A server or a model file."""

    model: str  # name@version
    top_k: int  # at most the model's labels
    concurrency: int

    async def __aenter__(self) -> Self:
        """Get ready."""
        ...

    async def __aexit__(self, *_: object) -> None:
        """Clean up."""
        ...

    async def classify(self, data: bytes) -> list[Prediction]:
        """Return an image's best labels."""
        ...


def main(arguments: Sequence[str] | None = None) -> int:
    """Classify; return the exit code.

    0, or 1 if an image failed, or 2 if nothing could be done; 130 after Ctrl+C, and 141 if nobody
    reads the results any more, as a shell reports both.
    """
    prepare_streams()
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.ERROR, format="mixer-classify: %(message)s")
    try:
        import httpx2  # noqa: F401 - asked here, so that its absence is one line
        import tqdm  # noqa: F401 - likewise
    except ImportError as error:
        return _refuse(f"{error.name} is not installed: pip install '.[client]'")
    output: Path | None = options.output
    try:
        if output is not None and output.exists() and not output.is_file():
            # As root, a new file would take the place of /dev/null.
            return _refuse(f"--output {output}: expected a file of its own, or none for stdout")
        if options.format == "table" and not options.overwrite and _holds_something(output):
            return _refuse(f"--output {output}: is there already; --overwrite replaces it")
        # The results of the last run may lie among the images.
        images = [image for image in find_images(options.paths) if not _is_same(image, output)]
        return asyncio.run(_run(options, images))
    except BrokenPipeError:  # `| head` has seen enough
        drop_output()
        return UNREAD
    except (NothingFoundError, OtherModelError, ServerError) as error:
        return _refuse(str(error))
    except OSError as error:  # standard output may be full
        drop_output()
        return _refuse(str(error))
    except KeyboardInterrupt:
        return INTERRUPTED


async def _run(options: argparse.Namespace, images: list[Path]) -> int:
    from tqdm import tqdm

    async with _backend(options) as backend:
        done: set[str] = set()
        if options.output is not None and not options.overwrite:
            done = finished(options.output, options.format, backend.model, backend.top_k)
        elif options.output is not None:
            options.output.unlink(missing_ok=True)
        left = [image for image in images if str(image) not in done]
        order = [str(image) for image in left]
        with (
            tqdm(total=len(images), unit="image", disable=_quiet(options)) as progress,
            open_writer(options.output, options.format, backend.top_k, order) as writer,
        ):
            progress.update(len(images) - len(left))
            failed = await _classify_all(backend, left, writer, progress.update)
    if not failed:
        return ALL_GOOD
    count = f"{len(failed)} of {len(left)} images failed"
    first = printable(f"{failed[0].path}: {failed[0].error}")
    sys.stderr.write(f"mixer-classify: {count}, the first {first}\n")
    return SOME_FAILED


async def _classify_all(
    backend: Backend, images: list[Path], writer: Writer, tell_progress: Callable[[], object]
) -> list[Result]:
    """Classify every image, so many at once; return the failures."""
    todo = iter(images)
    failed: list[Result] = []

    async def work() -> None:
        for image in todo:  # all workers take from the same iterator
            try:
                data = await asyncio.to_thread(image.read_bytes)
                result = Result(str(image), backend.model, await backend.classify(data))
            except (ImageError, OSError) as error:
                result = Result(str(image), backend.model, error=str(error))
                failed.append(result)
            except MemoryError:
                reason = "The file is larger than what memory is left."
                result = Result(str(image), backend.model, error=reason)
                failed.append(result)
            writer.write(result)
            tell_progress()

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(backend.concurrency, len(images))):
                group.create_task(work())
    except* Exception as group_error:
        raise group_error.exceptions[0] from None  # one reason is enough
    return failed


def _backend(options: argparse.Namespace) -> Backend:
    target: str = options.target
    if target.lower().startswith(("http://", "https://")):
        from app.client.remote import RemoteClassifier

        return RemoteClassifier(
            target, options.top_k, options.concurrency, options.retries, _key(options.api_key_file)
        )
    if _HOST_AND_PORT.fullmatch(target) and not Path(target).exists():
        raise ServerError(f"{target}: no such file; the address of a server begins with http://")
    from app.client.local import LocalClassifier

    return LocalClassifier(Path(target), options.top_k)


def _is_same(image: Path, output: Path | None) -> bool:
    return output is not None and image.name == output.name and image.resolve() == output.resolve()


def _holds_something(file: Path | None) -> bool:
    return file is not None and file.exists() and file.stat().st_size > 0


def _key(file: Path | None) -> str | None:
    """Return the first key of a file that is written as the server's own."""
    from app.keys import read_keys

    try:
        return None if file is None else read_keys(file)[0]
    except ValueError as error:  # the text itself stays out of the message
        reason = "it is not UTF-8" if isinstance(error, UnicodeError) else error
        raise ServerError(f"--api-key-file {file}: {reason}") from None


def _quiet(options: argparse.Namespace) -> bool:
    return bool(options.quiet) or not sys.stderr.isatty()


def _refuse(reason: str) -> int:
    sys.stderr.write(f"mixer-classify: {reason}\n")
    return USELESS


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="mixer-classify",
        description="Classify many images with a running server or a model file. A run that was "
        "broken off goes on where it stopped when it is given the same --output again.",
        epilog="Exit code: 0 all classified, 1 some failed, 2 nothing could be done.",
        allow_abbrev=False,
    )
    add, positive = parser.add_argument, number_within(int, 1, 1_000_000)
    add("target", metavar="URL_OR_MODEL", help="http(s)://… of a server, or an .onnx file")
    add("paths", metavar="PATH", nargs="+", help="image, folder (with all below it) or 'glob/**'")
    add("--top-k", type=positive, default=5, help="labels for each image (default: 5)")
    add("--format", choices=("table", "jsonl", "csv"), default="table", help="(default: table)")
    add("-o", "--output", type=Path, help="file for the results (default: standard output)")
    add("--overwrite", action="store_true", help="begin --output anew instead of going on with it")
    add(
        "--concurrency",
        type=positive,
        default=8,
        help="requests at once, to a server (default: 8; enough for full batches, and the others' "
        "share of a service is left)",
    )
    add(
        "--retries",
        type=number_within(int, 0, 1_000_000),
        default=10,
        help="how often a busy or unreachable server is asked again (default: 10)",
    )
    add("--api-key-file", type=Path, help="file that holds the server's API key")
    add("-q", "--quiet", action="store_true", help="no progress bar")
    return parser


if __name__ == "__main__":
    sys.exit(main())
