"""pytriton: Triton's core with its dynamic batcher; one Python instance, a decoder per core."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from app.cpus import available_cpus
from tests.benchmarks.servers.work import MAX_BATCH, PORT, Work

work = Work()
decoders = ThreadPoolExecutor(available_cpus())


@batch
def classify(image: NDArray[np.object_]) -> dict[str, NDArray[np.object_]]:
    """Return one JSON answer per image; image is bytes [batch, 1]."""
    patches = list(decoders.map(work.prepare, image[:, 0]))
    answers = [json.dumps(work.answer(logits)).encode() for logits in work.infer(patches)]
    return {"answer": np.array(answers, np.object_)[:, None]}


if __name__ == "__main__":
    config = TritonConfig(
        http_port=PORT,
        http_address="127.0.0.1",
        grpc_port=PORT + 1,
        grpc_address="127.0.0.1",
        metrics_port=PORT + 2,
        allow_metrics=False,
    )
    with Triton(config=config) as triton:
        triton.bind(
            model_name="classify",
            infer_func=classify,
            inputs=[Tensor(name="image", dtype=bytes, shape=(1,))],
            outputs=[Tensor(name="answer", dtype=bytes, shape=(1,))],
            config=ModelConfig(
                max_batch_size=MAX_BATCH,
                batcher=DynamicBatcher(),
            ),
            strict=False,
        )
        triton.serve()
    sys.exit(0)
