"""The commands `mixer-export` and `mixer-train`, which a server's installation has, too.

It lacks torch and what comes with it: they are the extra `export`.
"""

import importlib
import signal
import sys

from app.arguments import prepare_streams


def mixer_export() -> int:
    """Run `mixer-export`; return its exit code."""
    return _run("mixer-export", "model_export.cli")


def mixer_train() -> int:
    """Run `mixer-train`; return its exit code."""
    return _run("mixer-train", "model_export.train")


def _run(command: str, module: str) -> int:
    prepare_streams()
    # By default a signal ends a process as it stands, and half a file would stay behind.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        code: int = importlib.import_module(module).main()
    except ModuleNotFoundError as error:
        is_light = sys.argv[1:2] == ["adapt"] and error.name != "torch"
        extra = "adapt" if is_light else "export"
        sys.stderr.write(f"{command}: {error.name} is not installed: pip install '.[{extra}]'\n")
        return 1
    except KeyboardInterrupt:  # before the command itself takes care of it: torch takes seconds
        sys.stderr.write(f"{command}: stopped\n")
        return 128 + signal.SIGINT
    return code
