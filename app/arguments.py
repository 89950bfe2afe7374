"""What all commands share: a wrong argument is one line, as is a standard output that is full."""

import argparse
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from app.start import open_standard_streams

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

Number = TypeVar("Number", int, float)

UNREAD = 128 + 13  # nobody reads what a command writes: as a shell reports SIGPIPE


class Arguments(argparse.ArgumentParser):
    """A parser that names what is wrong and where help is, without a page of usage before it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        told = f"{self.prog} {version('mixer-serve')}"
        self.add_argument("--version", action="version", version=told, help="show it and exit")

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        line = " ".join(message.split())  # an argument may hold line breaks
        self.exit(2, f"{self.prog}: {line}; see {self.prog} --help\n")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Exit, unless standard output cannot take what was written to it."""
        with standard_output(self.prog):
            pass  # the version waits to be flushed
        super().exit(status, message)

    def print_help(self, file: "SupportsWrite[str] | None" = None) -> None:
        """Write the help, or say why it cannot be written."""
        stream = file or sys.stdout or sys.stderr
        with standard_output(self.prog):
            if stream is not None:  # closed, as is the other
                stream.write(self.format_help())


def prepare_streams() -> None:
    """Let closed standard streams lead nowhere; escape what the encoding of output lacks."""
    open_standard_streams()
    if sys.stdout is None:  # as Python has it
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error's


@contextmanager
def standard_output(command: str) -> Iterator[None]:
    """Flush what was written to standard output, and end the command if it cannot be.

    Python itself would tell it only at exit, in more than one line.
    """
    try:
        yield
        if sys.stdout is not None:  # closed
            sys.stdout.flush()
    except OSError as error:
        drop_output()
        if isinstance(error, BrokenPipeError):  # `| head` has seen enough
            sys.exit(UNREAD)
        sys.stderr.write(f"{command}: standard output: {error.strerror}\n")
        sys.exit(1)


def drop_output() -> None:
    """Drop what standard output holds and cannot take: Python would complain of it at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def number_within(kind: type[Number], least: Number, most: Number) -> Callable[[str], Number]:
    """Return what reads an argument as a number from `least` to `most`, for `type=`."""

    def read(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:  # nor is "nan"
            raise argparse.ArgumentTypeError(f"'{text}' is not a number from {least} to {most}")
        return value

    return read
