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
    # By default the signal ends a process as it stands, and half a file would stay behind.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        code: int = importlib.import_module(module).main()
    except ModuleNotFoundError as error:
        is_light = sys.argv[1:2] == ["adapt"] and error.name != "torch"
        extra = "adapt" if is_light else "export"
        sys.stderr.write(f"{command}: {error.name} is not installed: pip install '.[{extra}]'\n")
        return 1
    return code
