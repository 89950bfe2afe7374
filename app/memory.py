"""The memory of a device, as fixed buffers are fed and read."""

import ctypes
import math
import mmap
import weakref
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from app.errors import StartupError

_EITHER_WAY = ctypes.c_int(4)  # cudaMemcpyDefault: CUDA knows whose an address is


class Memory(NamedTuple):
    """Of one device."""

    device: str  # ONNX Runtime's name
    stage: Callable[[tuple[int, ...]], NDArray[np.uint8]]  # a host buffer that it reads from
    copy: Callable[[int, int, int], object]  # to an address, from another, so many bytes


def _pageable(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    return np.zeros(shape, np.uint8)


CPU_MEMORY = Memory("cpu", _pageable, ctypes.memmove)


def gpu_memory() -> Memory:
    """Return the first GPU's memory, fed from pinned buffers.

    Copies go past ONNX Runtime's own, which hold the GIL: for milliseconds, or for good on a GPU
    that hangs.

    Raises:
        StartupError: CUDA's runtime cannot be loaded.
    """
    try:
        runtime = ctypes.CDLL(f"libcudart.so.{_cuda_major()}")
    except OSError as error:
        raise StartupError(f"CUDA's runtime cannot be loaded: {error}") from error
    return Memory("cuda", partial(_pinned, runtime), partial(_copy, runtime))


def _pinned(runtime: ctypes.CDLL, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return a staging buffer uint8 [*shape] that the GPU reads: locked in memory while it lives.

    Its pages are its own, for CUDA pins none of them twice.

    Raises:
        OSError, RuntimeError: there is no memory, or CUDA refuses.
    """
    pages = mmap.mmap(-1, math.prod(shape), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer = np.frombuffer(pages, np.uint8)
    address = ctypes.c_void_p(buffer.ctypes.data)
    status = runtime.cudaHostRegister(address, ctypes.c_size_t(buffer.nbytes), ctypes.c_uint(0))
    if status:
        runtime.cudaGetLastError()  # or a later call would be told of this one's
        raise RuntimeError(f"CUDA cannot pin {buffer.nbytes} bytes of memory (error {status})")
    # What comes to lie at this address afterwards could else not be pinned (error 712). At the
    # process's end CUDA may be gone before us.
    weakref.finalize(buffer, runtime.cudaHostUnregister, address).atexit = False
    return buffer.reshape(shape)


def _copy(runtime: ctypes.CDLL, to: int, source: int, size: int) -> None:
    """Copy `size` bytes between addresses of host or GPU; done when it returns.

    Raises:
        RuntimeError: CUDA refuses, or the GPU is broken.
    """
    status = runtime.cudaMemcpy(
        ctypes.c_void_p(to), ctypes.c_void_p(source), ctypes.c_size_t(size), _EITHER_WAY
    )
    if status:
        runtime.cudaGetLastError()  # as above
        raise RuntimeError(f"CUDA cannot copy {size} bytes (error {status})")


def _cuda_major() -> str:
    from onnxruntime.capi import build_and_package_info

    return str(build_and_package_info.cuda_version).partition(".")[0]
