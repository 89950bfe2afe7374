"""What all commands share: a wrong argument is one line, as every other reason not to begin."""

import argparse
from typing import NoReturn


class Arguments(argparse.ArgumentParser):
    """A parser that names what is wrong and where help is, without a page of usage before it."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")
