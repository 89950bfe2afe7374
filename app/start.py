"""The command `mixer-serve`: a signal ends it from its first moment on."""

import importlib
import os
import signal


def main() -> int:
    """Serve; return the exit code. What serving needs takes half a second to import."""
    end_when_told()
    code: int = importlib.import_module("app.serve").main()
    return code


def end_when_told() -> None:
    """End at once on a signal until the server listens to it: there is nothing yet to drain.

    The first process of a container would else not hear of it at all (signal(7), pid_namespaces).
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: os._exit(128 + received))
