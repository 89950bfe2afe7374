"""LitServe: batching in the worker, decoding there too; its documentation's batching example."""

from typing import Any

import litserve
import numpy as np
from fastapi import Request
from numpy.typing import NDArray

from tests.benchmarks.servers.work import MAX_BATCH, PORT, Work


class Classify(litserve.LitAPI):
    """The stages that LitServe calls."""

    def setup(self, device: str) -> None:
        """Load the model in the worker."""
        self._work = Work()

    def decode_request(self, request: Request) -> NDArray[np.uint8]:
        """Return patches uint8 [tokens, P·P·3] of the form's field `file`."""
        return self._work.prepare(request["file"].file.read())

    def batch(self, inputs: list[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
        """Leave the images as they are: stacking belongs to the work measured everywhere."""
        return inputs

    def predict(self, batch: list[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Return logits float32 [batch, classes]."""
        return self._work.infer(batch)

    def unbatch(self, output: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """Return the rows."""
        return list(output)

    def encode_response(self, output: NDArray[np.float32]) -> dict[str, Any]:
        """Return the JSON answer."""
        return self._work.answer(output)


if __name__ == "__main__":
    api = Classify(max_batch_size=MAX_BATCH)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=PORT, log_level="warning", generate_client_file=False)
