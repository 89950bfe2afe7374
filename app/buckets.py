"""Fixed batch sizes with fixed buffers, as CUDA graphs need them.

A batch is padded to the next bucket and its answer cut back. On the CPU exact batches are faster;
the same code runs there under test.
"""

from bisect import bisect_left
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from app.memory import Memory
from app.shares import Share

if TYPE_CHECKING:
    import onnxruntime


def bucket_sizes(max_batch: int) -> tuple[int, ...]:
    """Return 1, 2, 4, … and `max_batch`: padding then never doubles the work."""
    doublings = (1 << exponent for exponent in range(max_batch.bit_length()))
    return (*(size for size in doublings if size < max_batch), max_batch)


class Buckets:
    """Runs batches of any size up to the largest bucket.

    All of it on one thread of its own: ONNX Runtime keeps a captured CUDA graph per thread, and the
    buffers hold one batch at a time. So any thread may call, and none captures a graph anew. Only
    what `stack` returns is for one thread at a time.
    """

    threads = 1

    def __init__(
        self, session: "onnxruntime.InferenceSession", max_batch: int, memory: Memory
    ) -> None:
        """Allocate all buffers."""
        _, tokens, patch_bytes = session.get_inputs()[0].shape
        self._sizes = bucket_sizes(max_batch)
        self._staging = memory.stage((max_batch, tokens, patch_bytes))
        self._buckets = [
            Bucket(session, self._staging[:size], memory, graph_id)
            for graph_id, size in enumerate(self._sizes, start=1)
        ]
        self._thread = ThreadPoolExecutor(1, "mixer-device")

    def cut(self, images: int) -> list[Share]:
        """Return one share: a device takes a batch whole."""
        return [Share(images)]

    def stack(self, pictures: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """Return patches uint8 [batch, tokens, P·P·3], in the buffer that the device reads from.

        They stay until the next call. So a picture is copied once on its way there, not twice.

        Raises:
            ValueError: there are more than the largest bucket holds.
        """
        return np.stack(pictures, out=self._staging[: len(pictures)])

    def infer(self, patches: NDArray[np.uint8], share: Share) -> NDArray[np.float32]:
        """Return what `run` does."""
        del share  # all there is
        return self.run(patches)

    def run(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return logits float32 [batch, classes] for patches uint8 [batch, tokens, P·P·3].

        Raises:
            ValueError: the batch is larger than the largest bucket.
        """
        if len(patches) > self._sizes[-1]:
            raise ValueError(f"a batch of {len(patches)} is over the largest of {self._sizes[-1]}")
        bucket = self._buckets[bisect_left(self._sizes, len(patches))]
        return self._thread.submit(bucket.run, patches).result()


class Bucket:
    """One batch size: device buffers and their binding, at addresses that stay."""

    def __init__(
        self,
        session: "onnxruntime.InferenceSession",
        staging: NDArray[np.uint8],
        memory: Memory,
        graph_id: int,
    ) -> None:
        """Bind buffers for batches of the size of `staging`, which all buckets share."""
        import onnxruntime

        _, self._classes = session.get_outputs()[0].shape
        make = onnxruntime.OrtValue.ortvalue_from_shape_and_type
        self._staging = staging  # uint8 [size, tokens, P·P·3]
        self._copy = memory.copy
        self._input: Any = make(staging.shape, np.uint8, memory.device, 0)
        self._output: Any = make((len(staging), self._classes), np.float32, memory.device, 0)
        self._session = session
        self._binding = session.io_binding()
        self._binding.bind_ortvalue_input("patches", self._input)
        self._binding.bind_ortvalue_output("logits", self._output)
        self._options = onnxruntime.RunOptions()
        # Which captured graph this batch size replays; without enable_cuda_graph it says nothing.
        self._options.add_run_config_entry("gpu_graph_id", str(graph_id))

    def run(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return logits float32 [batch, classes] for at most `size` patches, a copy of its own.

        What pads the batch is left over from an earlier one: rows never see each other.
        """
        staged = self._staging[: len(patches)]
        if patches.ctypes.data != staged.ctypes.data:  # else `stack` has put them there
            staged[:] = patches
        logits = np.empty((len(patches), self._classes), np.float32)
        self._copy(self._input.data_ptr(), staged.ctypes.data, staged.nbytes)
        self._session.run_with_iobinding(self._binding, self._options)
        self._copy(logits.ctypes.data, self._output.data_ptr(), logits.nbytes)
        return logits
