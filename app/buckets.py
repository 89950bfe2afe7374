"""Fixed batch sizes with fixed buffers, as CUDA graphs need them.

A batch is padded to the next bucket and its answer cut back. On the CPU exact batches are faster;
the same code runs there under test.
"""

from bisect import bisect_left
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from app.shares import Share

if TYPE_CHECKING:
    import onnxruntime

Stage = Callable[[tuple[int, ...]], NDArray[np.uint8]]


def bucket_sizes(max_batch: int) -> tuple[int, ...]:
    """Return 1, 2, 4, … and `max_batch`: padding then never doubles the work."""
    doublings = (1 << exponent for exponent in range(max_batch.bit_length()))
    return (*(size for size in doublings if size < max_batch), max_batch)


class Buckets:
    """Runs batches of any size up to the largest bucket.

    All of it on one thread of its own: ONNX Runtime keeps a captured CUDA graph per thread, and the
    buffers hold one batch at a time. So any thread may call, and none captures a graph anew.
    """

    threads = 1

    def __init__(
        self, session: "onnxruntime.InferenceSession", max_batch: int, device: str, stage: Stage
    ) -> None:
        """Allocate for `device` (cpu or cuda); `stage` makes the buffer that it reads from."""
        _, tokens, patch_bytes = session.get_inputs()[0].shape
        self._sizes = bucket_sizes(max_batch)
        self._staging = stage((max_batch, tokens, patch_bytes))
        self._buckets = [
            Bucket(session, self._staging[:size], device, graph_id)
            for graph_id, size in enumerate(self._sizes, start=1)
        ]
        self._thread = ThreadPoolExecutor(1, "mixer-device")

    def cut(self, images: int) -> list[Share]:
        """Return one share: a device takes a batch whole."""
        return [Share(images)]

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
        device: str,
        graph_id: int,
    ) -> None:
        """Bind buffers for batches of the size of `staging`, which all buckets share."""
        import onnxruntime

        _, classes = session.get_outputs()[0].shape
        make = onnxruntime.OrtValue.ortvalue_from_shape_and_type
        self._staging = staging  # uint8 [size, tokens, P·P·3]
        self._input: Any = make(staging.shape, np.uint8, device, 0)
        self._output: Any = make((len(staging), classes), np.float32, device, 0)
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
        self._staging[: len(patches)] = patches
        self._input.update_inplace(self._staging)
        self._session.run_with_iobinding(self._binding, self._options)
        # On the CPU numpy() is a view of the buffer, which the next batch overwrites.
        logits: NDArray[np.float32] = self._output.numpy()[: len(patches)].copy()
        return logits
