"""ONNX Runtime: loaded when it is needed, its sessions opened alike."""

import os
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from app.errors import StartupError, first_line

if TYPE_CHECKING:
    import onnxruntime

CPU = "CPUExecutionProvider"
MORE_MEMORY = "allow more (the container's limit, ulimit -v and -d)"
_NO_MEMORY = ("bad_alloc", "Cannot allocate memory")


def cpu_session(path: Path, threads: int) -> "onnxruntime.InferenceSession":
    """Open a model on the CPU.

    Raises:
        StartupError: it is none.
    """
    try:
        return runtime().InferenceSession(path, options(threads), providers=[CPU])
    except Exception as error:  # onnxruntime raises a class of its own for each status
        if any(words in str(error) for words in _NO_MEMORY):
            raise StartupError(
                f"MIXER_MODEL={path}: there is too little memory to load it; {MORE_MEMORY}"
            ) from error
        raise StartupError(
            f"MIXER_MODEL={path}: not a model that onnxruntime can load ({first_line(error)}); "
            "write it with mixer-export convert"
        ) from error


def options(threads: int) -> "onnxruntime.SessionOptions":
    """Return the options of a session, on whatever device."""
    chosen = runtime().SessionOptions()
    chosen.log_severity_level = 4  # its errors reach the operator as one line of ours instead
    chosen.intra_op_num_threads = threads
    chosen.inter_op_num_threads = 1  # a Mixer is a chain: nothing runs side by side
    # Threads that spin for work would take the cores from decoding.
    chosen.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return chosen


def runtime() -> ModuleType:
    """Import ONNX Runtime; only here, so that `--help` and the tests' fakes do without.

    Raises:
        StartupError: it is not installed, or cannot be loaded.
    """
    # Its Linux builds report their use over the network unless told not to.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise StartupError(
            "onnxruntime is not installed: pip install '.[cpu]' or '.[gpu]'"
        ) from error
    except ImportError as error:  # no memory left for it, or a library of the system is missing
        raise StartupError(f"onnxruntime cannot be loaded: {first_line(error)}") from error
    module: ModuleType = onnxruntime
    return module
