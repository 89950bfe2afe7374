"""The CUDA path on a real GPU: parity, captured graphs, steady memory, speed.

`MIXER_GPU_MODEL` names another model file than the embedded one, half precision say.
"""

import ctypes
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from app.buckets import bucket_sizes
from app.cuda import CUDA, GpuOptions
from app.engine import OnnxEngine
from app.errors import StartupError
from app.settings import EMBEDDED_MODEL

pytestmark = pytest.mark.gpu

MODEL = Path(os.environ.get("MIXER_GPU_MODEL", EMBEDDED_MODEL))
MAX_BATCH = 32


@pytest.fixture(scope="module")
def engine() -> OnnxEngine:
    """Return the model on CUDA; its golden sample has passed then."""
    return OnnxEngine(MODEL, "cuda", 1, max_batch=MAX_BATCH)


def draw(engine: OnnxEngine, batch: int, seed: int = 0) -> NDArray[np.uint8]:
    """Return random patches uint8 [batch, tokens, P·P·3]."""
    shape = (batch, engine.card.preprocessing.tokens, engine.card.preprocessing.patch_bytes)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_provider(engine: OnnxEngine) -> None:
    """The provider in use is CUDA, and `auto` takes it, too."""
    assert engine.provider == CUDA
    assert OnnxEngine(MODEL, "auto", 1, max_batch=1).provider == CUDA


def test_parity_with_the_cpu(engine: OnnxEngine) -> None:
    """Every batch size gets the CPU's logits, within what the precision allows."""
    share = 1e-4 if engine.card.precision == "fp32" else 2e-2
    cpu = OnnxEngine(MODEL, "cpu", 4)
    for batch in range(1, MAX_BATCH + 1):
        patches = draw(engine, batch, seed=batch)
        expected = cpu.run(patches)
        difference = np.abs(engine.run(patches) - expected).max()
        assert difference <= share * np.abs(expected).max(), f"batch {batch}"


def test_graphs_are_replayed(capfd: pytest.CaptureFixture[str]) -> None:
    """Each bucket replays its own captured graph, and none is captured a second time."""
    import onnxruntime

    engine = OnnxEngine(MODEL, "cuda", 1, max_batch=4)
    for size in bucket_sizes(4):
        engine.run(draw(engine, size))
    onnxruntime.set_default_logger_severity(1)
    capfd.readouterr()
    for size in bucket_sizes(4):
        engine.run(draw(engine, size))
    log = capfd.readouterr().err
    onnxruntime.set_default_logger_severity(4)
    for graph_id in (1, 2, 3):
        assert f"cuda_graph_annotation_id {graph_id}" in log
    assert log.count("Replaying CUDA graph") == 3


def test_memory_is_steady(engine: OnnxEngine) -> None:
    """A thousand batches of all sizes allocate nothing on the GPU."""
    for batch in range(1, MAX_BATCH + 1):
        engine.run(draw(engine, batch))
    before = _free_bytes()
    for seed in range(1000):
        engine.run(draw(engine, 1 + seed % MAX_BATCH, seed))
    assert before - _free_bytes() < 2**20


def test_memory_limit_is_kept() -> None:
    """An arena that cannot hold the weights stops the start in one line."""
    with pytest.raises(StartupError, match=r"^MIXER_DEVICE=cuda: .+"):
        OnnxEngine(MODEL, "cuda", 1, gpu=GpuOptions(memory_mib=1))


def test_throughput_against_bare_onnxruntime(engine: OnnxEngine) -> None:
    """Copies, padding and the thread cost at most a tenth of bare onnxruntime's images/s."""
    import onnxruntime

    patches = draw(engine, MAX_BATCH)
    session = onnxruntime.InferenceSession(MODEL, providers=[(CUDA, {"use_tf32": "0"})])
    bare = _images_per_s(lambda: session.run(["logits"], {"patches": patches}))
    ours = _images_per_s(lambda: engine.run(patches))
    figures = f"bare onnxruntime {bare:.0f} images/s, engine {ours:.0f} images/s"
    assert ours >= 0.9 * bare, figures


def _images_per_s(once: Callable[[], object]) -> float:
    for _ in range(20):
        once()
    count, start = 0, time.perf_counter()
    while time.perf_counter() < start + 3:
        once()
        count += MAX_BATCH
    return count / (time.perf_counter() - start)


def _free_bytes() -> int:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    status = ctypes.CDLL("libcuda.so.1").cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    assert status == 0, f"cuMemGetInfo: error {status}"
    return free.value
