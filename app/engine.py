"""The engine: patches in, logits out, through ONNX Runtime on the device that was asked for."""

import contextlib
import ctypes
import io
import logging
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from app.errors import StartupError
from app.model_card import CardError, ModelCard, read_metadata

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
        expected = self._golden.logits()  # [1, classes]
        patches = self._golden.patches(self.card.preprocessing)
        for batch in (1, 3):
            try:
                logits = self.run(np.repeat(patches, batch, axis=0))
                difference = float(np.abs(logits - expected).max())
            except Exception as error:  # onnxruntime raises a class of its own for each status
                raise StartupError(
                    f"MIXER_MODEL={path}: {self.provider} cannot run it ({_first_line(error)})"
                ) from error
            if logits.shape != (batch, expected.shape[1]):
                raise StartupError(
                    f"MIXER_MODEL={path}: {batch} golden samples gave logits {logits.shape}, "
                    f"expected {(batch, expected.shape[1])}; export the model again"
                )
            if not difference <= self._golden.tolerance:  # also catches NaN
                raise StartupError(
                    f"MIXER_MODEL={path}: the golden sample's logits differ by {difference:.3g} "
                    f"(at most {self._golden.tolerance:.3g}) on {self.provider}: "
                    "wrong runtime, broken provider or damaged file; export the model again"
                )


class _CudaMissing(Exception):  # noqa: N818 - a reason in words, which becomes one of two others
    """What keeps CUDA from running the model here."""


def _open(path: Path, device: Device, threads: int) -> "tuple[onnxruntime.InferenceSession, str]":
    """Open a session on the device asked for; `auto` tries CUDA, then says why it is the CPU."""
    if device != "cpu":
        try:
            return _cuda_session(path, threads), CUDA
        except _CudaMissing as missing:
            if device == "cuda":
                raise StartupError(f"MIXER_DEVICE=cuda: {missing}") from missing
            logger.warning("device auto: serving on the CPU, since %s", missing)
    onnxruntime = _runtime()
    try:
        session = onnxruntime.InferenceSession(path, _options(threads), providers=[CPU])
    except Exception as error:  # onnxruntime raises a class of its own for each status
        raise StartupError(
            f"MIXER_MODEL={path}: not a model that onnxruntime can load ({_first_line(error)}); "
            "write it with mixer-export convert"
        ) from error
    return session, CPU


def _cuda_session(path: Path, threads: int) -> "onnxruntime.InferenceSession":
    """Open a session that runs on CUDA alone.

    Raises:
        _CudaMissing: the build, the driver, a library or the model does not allow it.
    """
    onnxruntime = _runtime()
    if CUDA not in onnxruntime.get_available_providers():
        raise _CudaMissing(
            "this onnxruntime is built without CUDA: pip install 'mixer-serve[gpu]' instead"
        )
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise _CudaMissing(
            "the NVIDIA driver's libcuda.so.1 is missing: run on a GPU host, with --gpus all"
        ) from error
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it finds, and never raises
        onnxruntime.preload_dlls()
    libraries = Path(str(onnxruntime.__file__)).parent / "capi"
    try:
        ctypes.CDLL(str(libraries / "libonnxruntime_providers_shared.so"), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(libraries / "libonnxruntime_providers_cuda.so"))
    except OSError as error:
        raise _CudaMissing(f"onnxruntime's CUDA provider cannot load: {error}") from error
    onnxruntime.set_default_logger_severity(4)  # what fails below reaches the operator as one line
    options = _options(threads)
    # Without this a node that CUDA cannot run, or all of them, would land silently on the CPU.
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    provider = (CUDA, {"use_tf32": "0"})  # TF32 would cost fp32 models three digits
    try:
        session = onnxruntime.InferenceSession(path, options, providers=[provider])
    except Exception as error:  # onnxruntime raises a class of its own for each status
        raise _CudaMissing(f"it cannot run {path} there ({_first_line(error)})") from error
    if session.get_providers()[0] != CUDA:
        raise _CudaMissing(f"onnxruntime fell back to {session.get_providers()[0]}")
    return session


def _options(threads: int) -> "onnxruntime.SessionOptions":
    options = _runtime().SessionOptions()
    options.log_severity_level = 4  # its errors reach the operator as one line of ours instead
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1  # a Mixer is a chain: nothing runs side by side
    # Threads that spin for work would take the cores from decoding.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


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
