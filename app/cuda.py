"""ONNX Runtime on an NVIDIA GPU, through CUDA or TensorRT, or a plain reason why not.

A session whose provider cannot load becomes one on the CPU without a word. So everything that it
needs is looked for first, and the fallback is forbidden.
"""

import contextlib
import ctypes
import hashlib
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from app.errors import StartupError, first_line

if TYPE_CHECKING:
    import onnxruntime

CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
# A bias goes with the GELU behind it here, in one kernel; on a CPU with the product before it.
KEPT_APART = ["MatMulAddFusion"]


class GpuMissing(Exception):  # noqa: N818 - a reason in words, which becomes one of two others
    """What keeps the GPU from running the model here."""


@dataclass(frozen=True, slots=True)
class GpuOptions:
    """What an operator may choose of the GPU."""

    memory_mib: int = 0  # of the inference arena; 0 sets no limit
    tensorrt_cache: Path | None = None  # without it TensorRT builds its engine at every start
    tensorrt: bool = False

    def passed_over(self, device: str) -> str | None:
        """Return the setting that would mean nothing on `device`, if one would."""
        if self.memory_mib and device == "cpu":
            return "gpu_memory_mib"
        if self.tensorrt_cache is not None and device != "tensorrt":
            return "tensorrt_cache"
        return None


def open_session(
    path: Path, options: "onnxruntime.SessionOptions", gpu: GpuOptions, max_batch: int
) -> "tuple[onnxruntime.InferenceSession, str]":
    """Return a session that runs on the GPU alone, and its provider's name.

    Raises:
        GpuMissing: the build, the driver, a library or the model does not allow it.
        StartupError: the cache cannot be written.
    """
    import onnxruntime

    if gpu.tensorrt and gpu.tensorrt_cache is not None:
        _prepare(gpu.tensorrt_cache)
    wanted = TENSORRT if gpu.tensorrt else CUDA
    if wanted not in onnxruntime.get_available_providers():
        raise GpuMissing(
            f"this onnxruntime is built without {wanted.removesuffix('ExecutionProvider')}: "
            "pip install '.[gpu]' instead"
        )
    _load_libraries(tensorrt=gpu.tensorrt)
    onnxruntime.set_default_logger_severity(4)  # what fails below reaches the operator as one line
    # Without this a node that the GPU cannot run, or all of them, would land silently on the CPU.
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    # It would lay out each bucket's memory anew beside that of the run it was learnt from.
    options.enable_mem_pattern = False
    try:
        providers = [(CUDA, cuda_options(gpu))]
        if gpu.tensorrt:
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
            providers.insert(0, (TENSORRT, tensorrt_options(gpu, path, max_batch)))
        # Without the last word Python would try again with other providers, and print so.
        session = onnxruntime.InferenceSession(
            path,
            options,
            providers=providers,
            enable_fallback=0,
            disabled_optimizers=KEPT_APART,
        )
    except Exception as error:  # onnxruntime raises a class of its own for each status
        hint = "; choose a larger MIXER_GPU_MEMORY_MIB" if is_over_limit(error) else ""
        raise GpuMissing(f"it cannot run {path} there ({reason(error)}){hint}") from error
    if session.get_providers()[0] != wanted:
        raise GpuMissing(f"onnxruntime fell back to {session.get_providers()[0]}")
    if gpu.tensorrt and (left := nodes_elsewhere(session, wanted)):
        raise GpuMissing(f"TensorRT does not take its {', '.join(left)}: use --device cuda")
    return session, wanted


def _prepare(cache: Path) -> None:
    """Make TensorRT's folder, or raise StartupError: it would say nothing, and keep no engine."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        is_writable = os.access(cache, os.W_OK | os.X_OK)
    except OSError:
        is_writable = False
    if not is_writable:
        raise StartupError(f"MIXER_TENSORRT_CACHE={cache}: it must be a folder that can be written")


def nodes_elsewhere(session: "onnxruntime.InferenceSession", provider: str) -> list[str]:
    """Return the operators that another provider runs, in order of their names.

    What TensorRT does not take, CUDA would, and nothing but the speed would tell. Casts are no
    work, and TensorRT may leave that of the input's bytes. The session must have been opened with
    `session.record_ep_graph_assignment_info`.
    """
    found = {
        node.op_type
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != provider
        for node in part.get_nodes()
    }
    return sorted(found - {"Cast"})


def cuda_options(gpu: GpuOptions) -> dict[str, str]:
    """Return the CUDA provider's options, in ONNX Runtime's words."""
    options = {
        # Rounding factors to 11 bits moves fp32 logits by 4e-4 of the largest, which no golden
        # sample passes. Who wants speed exports fp16.
        "use_tf32": "0",
        # Beside TensorRT it runs what is left over, and a graph would have to hold every node.
        "enable_cuda_graph": str(int(not gpu.tensorrt)),
        # Batch sizes are fixed: an arena that grows by doubling would only hold memory.
        "arena_extend_strategy": "kSameAsRequested",
    }
    if gpu.memory_mib:
        options["gpu_mem_limit"] = str(gpu.memory_mib * 2**20)
    return options


def tensorrt_options(gpu: GpuOptions, path: Path, max_batch: int) -> dict[str, str]:
    """Return TensorRT's options for the model at `path`, in ONNX Runtime's words.

    The profile covers every batch size, or TensorRT would build its engine anew for each.
    """
    tokens, patch_bytes = _input_shape(path)
    tail = f"x{tokens}x{patch_bytes}"
    options = {
        "trt_profile_min_shapes": f"patches:1{tail}",
        "trt_profile_opt_shapes": f"patches:{max_batch}{tail}",
        "trt_profile_max_shapes": f"patches:{max_batch}{tail}",
    }
    if gpu.memory_mib:
        options["trt_max_workspace_size"] = str(gpu.memory_mib * 2**20)
    if gpu.tensorrt_cache is not None:
        with path.open("rb") as model:
            digest = hashlib.file_digest(model, "sha256").hexdigest()
        options |= {
            "trt_engine_cache_enable": "True",  # 1, which CUDA's options take, is refused here
            "trt_engine_cache_path": str(gpu.tensorrt_cache),
            # ONNX Runtime knows an engine by the graph and the file's name: the same for a model
            # that was trained further, which would be served with the old weights.
            "trt_engine_cache_prefix": digest[:16],
            "trt_timing_cache_enable": "True",
            "trt_timing_cache_path": str(gpu.tensorrt_cache),
        }
    return options


def _input_shape(path: Path) -> tuple[int, int]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # nothing is run
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    _, tokens, patch_bytes = session.get_inputs()[0].shape
    return tokens, patch_bytes


def _load_libraries(*, tensorrt: bool) -> None:
    import onnxruntime

    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise GpuMissing(
            "the NVIDIA driver's libcuda.so.1 is missing: run on a GPU host, with --gpus all"
        ) from error
    if tensorrt:
        # As `use_tf32` above, for which TensorRT has no option; NVIDIA's libraries read it first.
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it finds, and never raises
        onnxruntime.preload_dlls()
    folder = Path(str(onnxruntime.__file__)).parent / "capi"
    names = ["libonnxruntime_providers_shared.so", "libonnxruntime_providers_cuda.so"]
    if tensorrt:
        names.append("libonnxruntime_providers_tensorrt.so")
    for name in names:
        try:
            ctypes.CDLL(str(folder / name), os.RTLD_GLOBAL | os.RTLD_NOW)
        except OSError as error:
            raise GpuMissing(f"onnxruntime's GPU provider cannot load: {error}") from error


def reason(error: Exception) -> str:
    """Return what of an error of ONNX Runtime's is for people, in one line."""
    line = first_line(error)
    if "no kernel image" in line:  # error 209: its wheels hold code for some architectures, no PTX
        return "this onnxruntime has no code for a GPU of this architecture"
    # Around CUDA's own words, and the arena's, are functions, files and the host's name.
    found = re.search(
        r"(?:CUDA failure \d+:|Available memory of|Failed to allocate memory) [^;]*[^; ]", line
    )
    return found[0] if found else line


def is_over_limit(error: Exception) -> bool:
    """Return whether it was `GpuOptions.memory_mib` that left an inference without memory."""
    return "Available memory of" in str(error)  # BFCArena's words for its own limit
