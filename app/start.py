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
    # Whoever blocks them while it starts us leaves them blocked.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))


def open_standard_streams() -> None:
    """Let those of the three that are closed lead nowhere: else they would be the next sockets.

    The event loop's own would stop its end: libuv holds that no such descriptor is closed.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest that is free
