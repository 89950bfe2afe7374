"""The CUDA path on a real GPU: parity, captured graphs, steady memory, speed.

`MIXER_GPU_MODEL` names another model file than the embedded one, half precision say.
"""

import ctypes
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from app.buckets import Bucket, Buckets, bucket_sizes
from app.cuda import CUDA, TENSORRT, GpuOptions
from app.engine import OnnxEngine
from app.errors import StartupError
from app.settings import EMBEDDED_MODEL
from app.shares import Share

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


@pytest.mark.parametrize("size", bucket_sizes(MAX_BATCH))
def test_graphs_are_replayed(engine: OnnxEngine, size: int) -> None:
    """Each bucket replays its captured graph, which knows no other addresses than its own."""
    buckets = engine._batches
    assert isinstance(buckets, Buckets)
    bucket = buckets._buckets[bucket_sizes(MAX_BATCH).index(size)]
    patches = draw(engine, size, seed=1)
    expected = engine.run(patches)
    engine.run(draw(engine, size, seed=2))
    # On the thread that has captured; the input lies where it always does.
    output = buckets._thread.submit(run_elsewhere, bucket, patches).result()
    assert not output.any(), "the nodes have run once more, one by one"
    difference = np.abs(bucket._output.numpy() - expected).max()
    assert difference <= 1e-3 * np.abs(expected).max()


def run_elsewhere(bucket: Bucket, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Run with another place for the logits; return what is there afterwards."""
    import onnxruntime

    shape = bucket._output.shape()
    output = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32), "cuda", 0)
    binding = bucket._session.io_binding()
    binding.bind_ortvalue_input("patches", bucket._input)
    binding.bind_ortvalue_output("logits", output)
    bucket._input.update_inplace(patches)
    bucket._session.run_with_iobinding(binding, bucket._options)
    logits: NDArray[np.float32] = output.numpy()
    return logits


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
    with pytest.raises(StartupError, match=r"^MIXER_DEVICE=cuda: .*(?i:memory)"):
        OnnxEngine(MODEL, "cuda", 1, gpu=GpuOptions(memory_mib=1))


def test_tensorrt_keeps_its_engine(tmp_path: Path) -> None:
    """TensorRT passes the golden sample, and a second start takes the engine of the first."""

    def start() -> dict[str, int]:
        gpu = GpuOptions(tensorrt_cache=tmp_path)
        assert OnnxEngine(MODEL, "tensorrt", 1, max_batch=4, gpu=gpu).provider == TENSORRT
        return {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.engine")}

    try:
        built = start()
    except StartupError as error:
        if "libnv" not in str(error):  # libnvinfer.so.10, libnvonnxparser.so.10
            raise
        pytest.skip(f"no TensorRT here: {error}")
    assert built
    assert start() == built


def test_throughput_against_bare_onnxruntime(
    engine: OnnxEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stacking, copies and the thread cost at most a tenth of bare onnxruntime's images/s.

    What a captured graph alone makes, without any of those, is printed beside it: the limit.
    """
    import onnxruntime

    patches = draw(engine, MAX_BATCH)
    pictures, share = list(patches), Share(MAX_BATCH)
    session = onnxruntime.InferenceSession(MODEL, providers=[(CUDA, {"use_tf32": "0"})])
    bare = _images_per_s(lambda: session.run(["logits"], {"patches": patches}))
    ours = _images_per_s(lambda: engine.infer(engine.stack(pictures), share))
    buckets = engine._batches
    assert isinstance(buckets, Buckets)
    bucket = buckets._buckets[-1]
    run = partial(bucket._session.run_with_iobinding, bucket._binding, bucket._options)
    graph = buckets._thread.submit(_images_per_s, run).result()  # where it was captured
    with capsys.disabled():
        print(
            f" bare onnxruntime {bare:.0f} images/s, engine {ours:.0f}, its graph {graph:.0f}",
            end=" ",
        )
    assert ours >= 0.9 * bare


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
