"""ONNX Runtime for the exporter: opened as the server opens it, refused in the exporter's words."""

from pathlib import Path
from typing import TYPE_CHECKING

from app.cpus import available_cpus
from app.engine import OnnxEngine
from app.errors import StartupError, first_line
from app.runtime import CPU, options, runtime
from model_export.errors import ExportError

if TYPE_CHECKING:
    import onnxruntime


def open_session(model: Path | bytes) -> "onnxruntime.InferenceSession":
    """Open a model, or a graph as bytes, on the CPU.

    Raises:
        ExportError: onnxruntime is not installed, or cannot load the model.
    """
    try:
        loaded, chosen = runtime(), options(available_cpus())
    except StartupError as error:
        raise ExportError(str(error)) from error
    try:
        return loaded.InferenceSession(model, chosen, providers=[CPU])
    except Exception as error:  # onnxruntime raises a class of its own for each status code
        name = model.name if isinstance(model, Path) else "the graph"
        raise ExportError(f"{name}: onnxruntime cannot load it ({first_line(error)})") from error


def open_engine(path: Path) -> OnnxEngine:
    """Open a model file as the server does, which proves it by its golden sample.

    Raises:
        ExportError: the server would not serve it.
    """
    try:
        return OnnxEngine(path, "cpu", available_cpus())
    except StartupError as error:
        raise ExportError(str(error).removeprefix("MIXER_MODEL=")) from error
