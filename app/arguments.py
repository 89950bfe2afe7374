"""What all commands share: a wrong argument is one line, as every other reason not to begin."""

import argparse
from collections.abc import Callable
from typing import NoReturn, TypeVar

Number = TypeVar("Number", int, float)


class Arguments(argparse.ArgumentParser):
    """A parser that names what is wrong and where help is, without a page of usage before it."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        line = " ".join(message.split())  # an argument may hold line breaks
        self.exit(2, f"{self.prog}: {line}; see {self.prog} --help\n")


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
