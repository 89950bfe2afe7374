"""What a machine without a GPU can prove of the CUDA path; the rest is in tests/gpu."""

import ctypes
import mmap
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from app import cuda, memory
from app.cuda import KEPT_APART, TENSORRT, GpuOptions, nodes_elsewhere
from app.engine import OnnxEngine
from app.errors import StartupError
from app.runtime import CPU
from app.settings import EMBEDDED_MODEL


class Runtime:
    """Stands for libcudart: it pins no byte twice, as CUDA does not."""

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}  # size by address
        self.has_error = False

    def cudaHostRegister(  # noqa: N802 - CUDA's name, as those below
        self, address: ctypes.c_void_p, size: ctypes.c_size_t, _: ctypes.c_uint
    ) -> int:
        """Pin, or return the error of what is pinned already."""
        start = address.value or 0
        for other, length in self.pinned.items():
            if start < other + length and other < start + size.value:
                self.has_error = True
                return 712
        self.pinned[start] = size.value
        return 0

    def cudaHostUnregister(self, address: ctypes.c_void_p) -> int:  # noqa: N802 - as above
        """Unpin."""
        del self.pinned[address.value or 0]
        return 0

    def cudaGetLastError(self) -> int:  # noqa: N802 - as above
        """Forget the last error."""
        self.has_error = False
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    """Return what stands for CUDA's runtime."""
    stand_in = Runtime()
    monkeypatch.setattr(memory, "_cuda_major", lambda: "13")
    monkeypatch.setattr(ctypes, "CDLL", {"libcudart.so.13": stand_in}.__getitem__)
    return stand_in


def test_pinned_as_long_as_it_lives(runtime: Runtime) -> None:
    """A staging buffer has pages of its own, pinned until the last view of them is gone."""
    buffer = memory.gpu_memory().stage((3, 5, 7))
    assert buffer.shape == (3, 5, 7)
    assert buffer.dtype == np.uint8
    assert runtime.pinned == {buffer.ctypes.data: 105}
    assert buffer.ctypes.data % mmap.PAGESIZE == 0
    part = buffer[:2]
    part[:] = 1  # the next batch is written there
    del buffer
    assert len(runtime.pinned) == 1
    del part
    assert not runtime.pinned


def test_refused_pinning_is_one_line(runtime: Runtime) -> None:
    """What CUDA refuses is told with its number, and no later call is told of it."""
    runtime.pinned = {0: 1 << 63}
    with pytest.raises(RuntimeError, match=r"^CUDA cannot pin 6 bytes of memory \(error 712\)$"):
        memory.gpu_memory().stage((1, 2, 3))
    assert not runtime.has_error


def test_nothing_is_unpinned_at_the_end() -> None:
    """What is still pinned when the process ends stays so: CUDA may be gone by then."""
    script = """
import ctypes
from types import SimpleNamespace
from app import memory

memory._cuda_major = lambda: "13"
runtime = SimpleNamespace(
    cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda _: print("unpinned")
)
ctypes.CDLL = {"libcudart.so.13": runtime}.__getitem__
stage = memory.gpu_memory().stage
buffer = stage((1, 2, 3))
stage((1, 2, 3))  # nobody keeps it
print("the end")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n") == ["unpinned", "the end", ""]


@pytest.mark.parametrize(("tensorrt", "override"), [(True, "0"), (False, None)])
def test_tensorrt_rounds_nothing(
    monkeypatch: pytest.MonkeyPatch, tensorrt: bool, override: str | None
) -> None:
    """TF32 is off before TensorRT's libraries are loaded; CUDA's provider has an option for it."""
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "")
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
    found: list[str | None] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda *_: None)
    monkeypatch.setattr(
        onnxruntime, "preload_dlls", lambda: found.append(os.environ.get("NVIDIA_TF32_OVERRIDE"))
    )
    cuda._load_libraries(tensorrt=tensorrt)
    assert found == [override]


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (
            "/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_call.cc:154 bool "
            "onnxruntime::CudaCall(...) [with ERRTYPE = cudaError] CUDA failure 35: CUDA driver "
            "version is insufficient for CUDA runtime version ; GPU=-1 ; hostname=box ; "
            "file=/onnxruntime_src/cuda_execution_provider.cc ; line=289 ; "
            "expr=cudaSetDevice(info_.device_id);",
            "CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version",
        ),
        ("the graph has no place there\nstack trace", "the graph has no place there"),
        (
            "Non-zero status code returned while running Cast node. Status Message: CUDA error "
            "cudaErrorNoKernelImageForDevice:no kernel image is available for execution",
            "this onnxruntime has no code for a GPU of this architecture",
        ),
        (
            "bfc_arena.cc:360 void* AllocateRawInternal(size_t) Failed to allocate memory for "
            "requested buffer of size 512",
            "Failed to allocate memory for requested buffer of size 512",
        ),
    ],
)
def test_reason_in_plain_words(said: str, kept: str) -> None:
    """Of an error of ONNX Runtime's its first line is told, and of one of CUDA's what CUDA said."""
    assert cuda.reason(RuntimeError(said)) == kept


def test_nodes_of_another_provider_are_named() -> None:
    """What a provider does not run is named by its operators, casts left out."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(EMBEDDED_MODEL, options, providers=[CPU])
    assert nodes_elsewhere(session, CPU) == []
    left = nodes_elsewhere(session, TENSORRT)
    assert {"MatMul", "Gelu", "LayerNormalization"} <= set(left)
    assert "Cast" not in left


@pytest.mark.parametrize(
    ("apart", "products", "activation"), [([], 33, "Gelu"), (KEPT_APART, 1, "BiasGelu")]
)
def test_a_bias_goes_with_its_gelu(
    tmp_path: Path, apart: list[str], products: int, activation: str
) -> None:
    """With CUDA's options a bias is one operator with GELU, on a CPU with the matrix product."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(
        EMBEDDED_MODEL, options, providers=[CPU], disabled_optimizers=apart
    )
    found = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert (found["Gemm"], found[activation]) == (products, 16)


def test_cache_that_takes_nothing(tmp_path: Path) -> None:
    """A place where TensorRT could keep no engine is told, which it would not do."""
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StartupError) as told:
            OnnxEngine(EMBEDDED_MODEL, "tensorrt", 1, gpu=GpuOptions(tensorrt_cache=place))
        assert str(told.value) == (
            f"MIXER_TENSORRT_CACHE={place}: it must be a folder that can be written"
        )


def test_cache_is_made(tmp_path: Path) -> None:
    """A folder for TensorRT's engine that is not there yet is made."""
    cache = tmp_path / "a" / "b"
    with pytest.raises(StartupError, match="MIXER_DEVICE=tensorrt: "):  # there is no GPU here
        OnnxEngine(EMBEDDED_MODEL, "tensorrt", 1, gpu=GpuOptions(tensorrt_cache=cache))
    assert cache.is_dir()
