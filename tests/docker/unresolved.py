"""Prints the libraries that onnxruntime's CUDA provider would not find; runs inside the image.

The server preloads NVIDIA's libraries from their wheels, in onnxruntime's own order; the loader
then finds them by name. So what is unresolved is what the loader misses and nothing preloaded is
called.
"""

import contextlib
import subprocess
import sys
from ctypes import CDLL
from pathlib import Path

import onnxruntime


def loaded(name: str) -> bool:
    """Return whether a library of this name is in the process already."""
    try:
        CDLL(name, mode=4)  # RTLD_NOLOAD: find it, but load nothing
    except OSError:
        return False
    return True


def main() -> None:
    """Print one name a line."""
    with contextlib.redirect_stdout(sys.stderr):
        onnxruntime.preload_dlls()
    provider = Path(onnxruntime.__file__).parent / "capi/libonnxruntime_providers_cuda.so"
    loader = next(Path("/").glob("lib*/ld-linux-*.so.*"))  # what `ldd` calls; that needs a shell
    traced = {"LD_TRACE_LOADED_OBJECTS": "1"}
    listed = subprocess.run(
        [loader, provider], env=traced, capture_output=True, text=True, check=True
    )
    missing = [line.split()[0] for line in listed.stdout.splitlines() if "not found" in line]
    sys.stdout.writelines(f"{name}\n" for name in missing if not loaded(name))


if __name__ == "__main__":
    main()
