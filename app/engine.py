"""The engine: patches in, logits out, through ONNX Runtime on the device that was asked for."""

import logging
import os
import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from app.buckets import Buckets
from app.cuda import GpuMissing, GpuOptions, is_over_limit, open_session, reason
from app.errors import StartupError
from app.memory import CPU_MEMORY, gpu_memory
from app.model_card import CardError, ModelCard, read_metadata
from app.runtime import CPU, cpu_session, options, runtime
from app.shares import Share, Shares

if TYPE_CHECKING:
    import onnxruntime

logger = logging.getLogger(__name__)

Device = Literal["auto", "cpu", "cuda", "tensorrt"]
PLAIN_GPU = GpuOptions()
# Multiplications for one image (parameters × tokens, about) that are not worth a second thread: the
# embedded model has 72 million and takes 2.0 ms with one thread, 1.6 with two, which HTTP eats up.
_SMALL = 200_000_000


class Engine(Protocol):
    """What the batcher needs of a model; tests bring their own of fixed latency."""

    card: ModelCard
    provider: str
    threads: int  # which may infer shares side by side

    def cut(self, images: int) -> list[Share]:
        """Return the shares in which a batch is inferred best, for `threads` to take in order."""
        ...

    def stack(self, pictures: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """Return patches uint8 [share, tokens, P·P·3] for the next `infer`, of single pictures."""
        ...

    def infer(self, patches: NDArray[np.uint8], share: Share) -> NDArray[np.float32]:
        """Return logits float32 [share, classes] for patches uint8 [share, tokens, P·P·3]."""
        ...

    def run(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return logits float32 [batch, classes] for patches uint8 [batch, tokens, P·P·3]."""
        ...


class OnnxEngine:
    """One ONNX Runtime session over a self-describing model file.

    On the CPU a batch is shared out among `threads`; what is left of a large model's images, fewer
    than threads, is inferred with all of them together. On a GPU a batch runs in buckets of up to
    `max_batch`, each with fixed buffers and, on CUDA, a captured graph; `bucketed` makes the CPU do
    so, for tests.

    Raises:
        StartupError: the file, its card, the device or the golden sample does not hold.
    """

    def __init__(
        self,
        path: Path,
        device: Device,
        threads: int,
        *,
        max_batch: int = 16,
        gpu: GpuOptions = PLAIN_GPU,
        bucketed: bool = False,
    ) -> None:
        if what := _what_is_wrong(path):
            raise StartupError(f"MIXER_MODEL={path}: {what}")
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise StartupError(
                f"MIXER_MODEL={path}: onnxruntime takes no path that is not UTF-8; rename it"
            ) from None
        runtime()  # without it there is no provider to ask for
        remark = ""
        if device != "cpu":
            try:
                self._open_on_gpu(path, threads, max_batch, gpu, tensorrt=device == "tensorrt")
            except (GpuMissing, StartupError) as error:
                if device != "auto" and isinstance(error, StartupError):
                    raise
                if device != "auto":
                    raise StartupError(f"MIXER_DEVICE={device}: {error}") from error
                device, remark = "cpu", f"device auto: serving on the CPU, since {error}"
        if device == "cpu":
            self._open_on_cpu(path, threads, max_batch, bucketed=bucketed)
        self.threads = self._batches.threads
        if remark:  # not before: what stops start-up is one line
            logger.warning(remark)

    def cut(self, images: int) -> list[Share]:
        """Return the shares of a batch: pieces for each core, or all of it for a GPU."""
        return self._batches.cut(images)

    def stack(self, pictures: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """Return patches uint8 [share, tokens, P·P·3] for the next `infer`, of single pictures."""
        return self._batches.stack(pictures)

    def infer(self, patches: NDArray[np.uint8], share: Share) -> NDArray[np.float32]:
        """Return logits float32 [share, classes] for patches uint8 [share, tokens, P·P·3]."""
        return self._batches.infer(patches, share)

    def run(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return logits float32 [batch, classes] for patches uint8 [batch, tokens, P·P·3]."""
        return self._batches.run(patches)

    def _open_on_gpu(
        self, path: Path, threads: int, max_batch: int, gpu: GpuOptions, *, tensorrt: bool
    ) -> None:
        """Run the model on a GPU, and prove that it does.

        Raises:
            GpuMissing: it cannot be opened there.
            StartupError: it does not run there, or not as it should.
        """
        gpu = replace(gpu, tensorrt=tensorrt)
        session, self.provider = open_session(path, options(threads), gpu, max_batch)
        self._read_card(path, session)
        memory = gpu_memory()
        try:
            self._batches: Buckets | Shares = Buckets(session, max_batch, memory)
        except Exception as error:  # onnxruntime raises a class of its own for each status
            raise too_large(max_batch, self.provider, error) from error
        self._check_golden(path, max_batch)

    def _open_on_cpu(self, path: Path, threads: int, max_batch: int, *, bucketed: bool) -> None:
        session, self.provider = cpu_session(path, threads), CPU
        self._read_card(path, session)
        if bucketed:
            self._batches = Buckets(session, max_batch, CPU_MEMORY)
        else:
            tokens = self.card.preprocessing.tokens
            narrow = cpu_session(path, 1) if threads > 1 else session
            if self.card.parameters * tokens < _SMALL:
                session = narrow
            self._batches = Shares(narrow, session, threads, tokens)
        self._check_golden(path, max_batch)

    def _read_card(self, path: Path, session: "onnxruntime.InferenceSession") -> None:
        try:
            self.card, self._golden = read_metadata(session.get_modelmeta().custom_metadata_map)
        except CardError as error:
            raise StartupError(f"MIXER_MODEL={path}: {error}") from error
        self._check_signature(path, session)

    def _check_signature(self, path: Path, session: "onnxruntime.InferenceSession") -> None:
        preprocessing = self.card.preprocessing
        found = session.get_inputs()[0]
        wanted = [preprocessing.tokens, preprocessing.patch_bytes]
        if found.name != "patches" or found.type != "tensor(uint8)" or found.shape[1:] != wanted:
            raise StartupError(
                f"MIXER_MODEL={path}: its input is {found.name} {found.type} {found.shape}, "
                f"but its card says patches tensor(uint8) [batch, {wanted[0]}, {wanted[1]}]"
            )

    def _check_golden(self, path: Path, max_batch: int) -> None:
        """Compare the golden sample with the exporter's logits, alone and inside a batch."""
        expected = self._golden.logits()  # [1, classes]
        patches = self._golden.patches(self.card.preprocessing)
        for batch in {1, min(3, max_batch)}:
            try:
                logits = self.run(np.repeat(patches, batch, axis=0))
                difference = float(np.abs(logits - expected).max())
            except Exception as error:  # onnxruntime raises a class of its own for each status
                raise StartupError(
                    f"MIXER_MODEL={path}: {self.provider} cannot run it ({reason(error)})"
                    + "; choose a larger MIXER_GPU_MEMORY_MIB" * is_over_limit(error)
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


def too_large(images: int, provider: str, error: Exception) -> StartupError:
    """Return that a device has no room for a batch of so many."""
    return StartupError(
        f"MIXER_MAX_BATCH={images}: {provider} cannot run so many images at once "
        f"({reason(error)}); choose fewer"
        + " or a larger MIXER_GPU_MEMORY_MIB"
        * is_over_limit(error)
    )


def _what_is_wrong(path: Path) -> str:
    """Return why the file cannot be read, and the fix; or nothing."""
    try:
        if stat.S_ISREG(path.stat().st_mode):
            path.open("rb").close()
            return ""
        what = "a folder" if path.is_dir() else "no regular file"
    except PermissionError:
        return f"user {os.geteuid()} may not read it; chmod a+r the file, and a+x its folders"
    except (OSError, ValueError):  # too long a name, or one that cannot be
        what = "no such file"
    return f"{what}; give a file from mixer-export"
