"""The engine: patches in, logits out, through ONNX Runtime on the device that was asked for."""

import contextlib
import ctypes
import io
import logging
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from app.errors import StartupError
from app.model_card import CardError, Golden, ModelCard, read_metadata

if TYPE_CHECKING:
    import onnxruntime

logger = logging.getLogger(__name__)

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
Device = Literal["auto", "cpu", "cuda"]


class Engine(Protocol):
    """What the batcher needs of a model; tests bring their own of fixed latency."""

    card: ModelCard
    provider: str

    def run(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return logits float32 [batch, classes] for patches uint8 [batch, tokens, P·P·3]."""
        ...


class OnnxEngine:
    """One ONNX Runtime session over a self-describing model file.

    Raises:
        StartupError: the file, its card, the device or the golden sample does not hold.
    """

    def __init__(self, path: Path, device: Device, threads: int) -> None:
        if not path.is_file():
            raise StartupError(f"MIXER_MODEL={path}: no such file; give one from mixer-export")
        self._session, self.provider = _open(path, device, threads)
        try:
            self.card, self._golden = read_metadata(
                self._session.get_modelmeta().custom_metadata_map
            )
        except CardError as error:
            raise StartupError(f"MIXER_MODEL={path}: {error}") from error
        self._check_signature(path)
        self._check_golden(path)

    def run(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return logits float32 [batch, classes] for patches uint8 [batch, tokens, P·P·3]."""
        logits: NDArray[np.float32] = self._session.run(["logits"], {"patches": patches})[0]
        return logits

    def _check_signature(self, path: Path) -> None:
        preprocessing = self.card.preprocessing
        found = self._session.get_inputs()[0]
        wanted = [preprocessing.tokens, preprocessing.patch_bytes]
        if found.name != "patches" or found.type != "tensor(uint8)" or found.shape[1:] != wanted:
            raise StartupError(
                f"MIXER_MODEL={path}: its input is {found.name} {found.type} {found.shape}, "
                f"but its card says patches tensor(uint8) [batch, {wanted[0]}, {wanted[1]}]"
            )

    def _check_golden(self, path: Path) -> None:
        """Compare the golden sample with the exporter's logits, alone and inside a batch."""
        golden: Golden = self._golden
        patches = golden.patches(self.card.preprocessing)
        for batch in (1, 3):
            logits = self.run(np.repeat(patches, batch, axis=0))
            difference = float(np.abs(logits - golden.logits()).max())
            if not difference <= golden.tolerance:  # also catches NaN
                raise StartupError(
                    f"MIXER_MODEL={path}: the golden sample's logits differ by {difference:.3g} "
                    f"(at most {golden.tolerance:.3g}) on {self.provider}: "
                    "wrong runtime, broken provider or damaged file; export the model again"
                )


def _open(path: Path, device: Device, threads: int) -> "tuple[onnxruntime.InferenceSession, str]":
    """Open a session on the device asked for; `auto` tries CUDA, then says why it is the CPU."""
    missing = _missing_for_cuda() if device != "cpu" else None
    if device == "cuda" and missing is not None:
        raise StartupError(f"MIXER_DEVICE=cuda: {missing}")
    if device == "auto" and missing is not None:
        logger.warning("device auto: serving on the CPU, since %s", missing)
    wanted = CPU if device == "cpu" or missing is not None else CUDA
    session = _session(path, wanted, threads)
    provider = str(session.get_providers()[0])
    if provider != wanted:
        raise StartupError(
            f"MIXER_DEVICE={device}: onnxruntime fell back to {provider}; "
            "its CUDA provider could not load: check the driver and the CUDA libraries"
        )
    return session, provider


def _session(path: Path, provider: str, threads: int) -> "onnxruntime.InferenceSession":
    onnxruntime = _runtime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its errors reach the operator as one line of ours instead
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1  # a Mixer is a chain: nothing runs side by side
    # Threads that spin for work would take the cores from decoding.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    chosen: list[str | tuple[str, dict[str, Any]]] = [provider]
    if provider == CUDA:
        # Without this a node that CUDA cannot run, or all of them, would land silently on the CPU.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        chosen = [(CUDA, {"use_tf32": "0"})]  # TF32 would cost fp32 models three digits
    try:
        return onnxruntime.InferenceSession(path, options, providers=chosen)
    except Exception as error:  # onnxruntime raises a class of its own for each status code
        reason = str(error).strip().splitlines()[0]
        if provider == CUDA:
            raise StartupError(f"MIXER_DEVICE=cuda: {reason}") from error
        raise StartupError(
            f"MIXER_MODEL={path}: not a model that onnxruntime can load ({reason}); "
            "write it with mixer-export convert"
        ) from error


def _runtime() -> ModuleType:
    """Import ONNX Runtime; only here, so that `--help` and the tests' fakes do without."""
    try:
        import onnxruntime
    except ImportError as error:
        raise StartupError(
            "onnxruntime is not installed: pip install 'mixer-serve[cpu]' or 'mixer-serve[gpu]'"
        ) from error
    module: ModuleType = onnxruntime
    return module


def _missing_for_cuda() -> str | None:
    """Return what keeps CUDA from running here, in words, or None."""
    onnxruntime = _runtime()
    if CUDA not in onnxruntime.get_available_providers():
        return "this onnxruntime is built without CUDA: pip install 'mixer-serve[gpu]' instead"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "the NVIDIA driver's libcuda.so.1 is missing: run on a GPU host, with --gpus all"
    onnxruntime.set_default_logger_severity(4)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it finds, and never raises
        onnxruntime.preload_dlls()
    return None
