"""The engine: buckets on the CPU, refusals without a GPU, the options a GPU is opened with."""

import ctypes
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import onnxruntime
import pytest

from app.buckets import Buckets, bucket_sizes
from app.cuda import CUDA, GpuOptions, cuda_options, tensorrt_options
from app.engine import Device, OnnxEngine
from app.errors import StartupError
from app.memory import CPU_MEMORY, gpu_memory
from app.model_card import CARD_KEY, CardError, Golden, read_metadata, write_metadata
from app.runtime import CPU
from app.settings import EMBEDDED_MODEL
from app.shares import Share, Shares
from tests.fakes import make_card


@pytest.fixture(scope="module")
def exact() -> OnnxEngine:
    """Return the embedded model on the CPU, batches at their own size."""
    return OnnxEngine(EMBEDDED_MODEL, "cpu", 1)


@pytest.fixture(scope="module")
def bucketed() -> OnnxEngine:
    """Return the embedded model on the CPU in buckets of 1, 2, 4, 8 and 11."""
    return OnnxEngine(EMBEDDED_MODEL, "cpu", 1, max_batch=11, bucketed=True)


def draw(batch: int, seed: int = 0) -> "np.typing.NDArray[np.uint8]":
    """Return random patches uint8 [batch, 64, 48]."""
    return np.random.default_rng(seed).integers(0, 256, (batch, 64, 48), dtype=np.uint8)


@pytest.mark.parametrize(
    ("max_batch", "sizes"),
    [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (8, (1, 2, 4, 8)), (12, (1, 2, 4, 8, 12))],
)
def test_bucket_sizes(max_batch: int, sizes: tuple[int, ...]) -> None:
    """Buckets are the doublings below the largest batch, and that batch itself."""
    assert bucket_sizes(max_batch) == sizes


@pytest.mark.parametrize("batch", range(1, 12))
def test_padded_batches_answer_as_exact_ones(
    exact: OnnxEngine, bucketed: OnnxEngine, batch: int
) -> None:
    """A batch padded to its bucket gets the logits of the same batch at its own size."""
    patches = draw(batch, seed=batch)
    logits = bucketed.run(patches)
    assert logits.shape == (batch, 10)
    np.testing.assert_allclose(logits, exact.run(patches), atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize("is_small", [True, False])
def test_shared_out_batches_answer_as_whole_ones(
    exact: OnnxEngine, monkeypatch: pytest.MonkeyPatch, batch: int, is_small: bool
) -> None:
    """With three threads each image gets the logits it gets with one, in its own place."""
    if not is_small:
        monkeypatch.setattr("app.engine._SMALL", 0)  # then two images are inferred by three threads
    shared = OnnxEngine(EMBEDDED_MODEL, "cpu", 3)
    patches = draw(batch, seed=batch)
    np.testing.assert_allclose(shared.run(patches), exact.run(patches), atol=1e-5)


def test_a_share_that_fails_fails_its_batch_alone(exact: OnnxEngine) -> None:
    """A batch with patches of a wrong size raises; the next one passes."""
    shared = OnnxEngine(EMBEDDED_MODEL, "cpu", 2)
    with pytest.raises(Exception, match="patches"):
        shared.run(np.zeros((4, 63, 48), np.uint8))
    np.testing.assert_allclose(shared.run(draw(4)), exact.run(draw(4)), atol=1e-5)


def test_images_of_many_tokens() -> None:
    """Images that have each more tokens than an inference is to have are inferred one by one."""
    session = Mock()
    assert Shares(session, session, threads=2, tokens=784).cut(5) == [Share(1)] * 5


def test_model_that_is_wrong_in_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose golden sample passes alone and fails inside a batch is refused."""
    run = Shares.run
    monkeypatch.setattr(Shares, "run", lambda self, x: run(self, x) + float(len(x) > 1))
    with pytest.raises(StartupError, match="golden sample's logits differ by 1 "):
        OnnxEngine(EMBEDDED_MODEL, "cpu", 1)


def test_card_with_a_label_too_few() -> None:
    """A card whose labels are not as many as the golden sample's logits is refused."""
    patches, logits = np.zeros((1, 4, 48), np.uint8), np.zeros((1, 3), np.float32)
    metadata = write_metadata(make_card(("red", "green")), Golden.of(patches, logits, 0.1))
    with pytest.raises(CardError, match="2 labels for 3 logits"):
        read_metadata(metadata)


@pytest.mark.parametrize(
    ("change", "member"),
    [
        ({"name": "team/model"}, "name"),
        ({"name": "\x1b[2Jmodel"}, "name"),
        ({"source": "x.npz\nready"}, "source"),
        ({"labels": ["red", "gre\ten", "blue"]}, "labels.1"),
    ],
)
def test_card_that_would_write_elsewhere(change: dict[str, object], member: str) -> None:
    """A card whose texts could not stand in a path, on a terminal or in a log is refused."""
    patches, logits = np.zeros((1, 4, 48), np.uint8), np.zeros((1, 3), np.float32)
    metadata = write_metadata(make_card(), Golden.of(patches, logits, 0.1))
    card = json.dumps(json.loads(metadata[CARD_KEY]) | change)
    with pytest.raises(CardError, match=rf"{member}: String should match pattern"):
        read_metadata({**metadata, CARD_KEY: card})


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ((30, 4), "image_size 30 is not a multiple of patch_size 4"),
        ((0, 4), "greater"),
        ((8, 0), "greater"),
    ],
)
def test_card_of_patches_that_do_not_tile(sizes: tuple[int, int], said: str) -> None:
    """A card whose image is not made up of whole patches is refused."""
    patches, logits = np.zeros((1, 4, 48), np.uint8), np.zeros((1, 3), np.float32)
    metadata = write_metadata(make_card(), Golden.of(patches, logits, 0.1))
    card = json.loads(metadata[CARD_KEY])
    card["preprocessing"] |= dict(zip(("image_size", "patch_size"), sizes, strict=True))
    with pytest.raises(CardError, match=said):
        read_metadata({**metadata, CARD_KEY: json.dumps(card)})


def test_answers_survive_the_next_batch(bucketed: OnnxEngine) -> None:
    """Logits already handed out do not change when the bucket's buffers are used again."""
    first = bucketed.run(draw(4, seed=1))
    kept = first.copy()
    bucketed.run(draw(4, seed=2))
    np.testing.assert_array_equal(first, kept)


def test_padding_is_left_over_and_harmless(bucketed: OnnxEngine) -> None:
    """What an earlier batch left in the padding does not touch a later answer."""
    patches = draw(3, seed=3)
    bucketed.run(draw(4, seed=4))
    before = bucketed.run(patches)
    bucketed.run(draw(4, seed=5))
    np.testing.assert_array_equal(bucketed.run(patches), before)


def test_any_thread_may_call(exact: OnnxEngine, bucketed: OnnxEngine) -> None:
    """Batches from several threads at once get each their own answer."""
    batches = [draw(1 + seed % 11, seed) for seed in range(40)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(bucketed.run, batches))
    for batch, answer in zip(batches, answers, strict=True):
        np.testing.assert_allclose(answer, exact.run(batch), atol=1e-5)


def test_batch_over_the_largest_bucket(bucketed: OnnxEngine) -> None:
    """A batch that fits no bucket is refused by its size, not cut."""
    with pytest.raises(ValueError, match="a batch of 12 is over the largest of 11"):
        bucketed.run(draw(12))


@pytest.mark.parametrize("locked", ["model.onnx", "."])
def test_file_that_may_not_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locked: str
) -> None:
    """A model that another user may not read is told so, not taken for none or for damaged."""
    model = tmp_path / "model.onnx"
    model.write_bytes(EMBEDDED_MODEL.read_bytes())
    if os.geteuid() == 0:  # who may read everything
        call = "stat" if locked == "." else "open"
        monkeypatch.setattr(Path, call, Mock(side_effect=PermissionError(13, "Permission denied")))
    else:
        (tmp_path / locked).chmod(0)
    with pytest.raises(StartupError, match=rf"user {os.geteuid()} may not read it; chmod a\+r"):
        OnnxEngine(model, "cpu", 1)
    monkeypatch.undo()
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda"])
def test_path_that_is_no_text(tmp_path: Path, device: Device) -> None:
    """A model whose path is no UTF-8 is refused for that, and not as if it were no model."""
    model = tmp_path / "\udce9" / "model.onnx"
    model.parent.mkdir()
    model.write_bytes(EMBEDDED_MODEL.read_bytes())
    with pytest.raises(StartupError, match="no path that is not UTF-8"):
        OnnxEngine(model, device, 1)


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_gpu_that_is_missing_stops_the_start(device: str) -> None:
    """A GPU device that cannot be had is one line that names the setting, never the CPU."""
    try:
        engine = OnnxEngine(EMBEDDED_MODEL, device, 1)  # type: ignore[arg-type] # a Literal, by parameter
    except StartupError as error:
        assert str(error).startswith(f"MIXER_DEVICE={device}: ")  # noqa: PT017 - a GPU machine has no error
        assert "\n" not in str(error)  # noqa: PT017 - as above
    else:
        assert engine.provider != "CPUExecutionProvider"


def test_cuda_options() -> None:
    """Graphs are on except beside TensorRT, TF32 is off, the arena's limit is in bytes."""
    plain = cuda_options(GpuOptions())
    assert plain["enable_cuda_graph"] == "1"
    assert plain["use_tf32"] == "0"
    assert "gpu_mem_limit" not in plain
    chosen = cuda_options(GpuOptions(memory_mib=512))
    assert chosen["gpu_mem_limit"] == str(512 * 1024 * 1024)
    assert cuda_options(GpuOptions(tensorrt=True))["enable_cuda_graph"] == "0"


def test_tensorrt_options() -> None:
    """One profile covers every batch size, best the full one; limit and cache are what is set.

    A model of other weights has another place in the cache, though all else is the same.
    """
    options = tensorrt_options(GpuOptions(tensorrt=True), EMBEDDED_MODEL, 16)
    assert options == {
        "trt_profile_min_shapes": "patches:1x64x48",
        "trt_profile_opt_shapes": "patches:16x64x48",
        "trt_profile_max_shapes": "patches:16x64x48",
    }
    limited = tensorrt_options(GpuOptions(tensorrt=True, memory_mib=512), EMBEDDED_MODEL, 16)
    assert limited == options | {"trt_max_workspace_size": str(512 * 1024 * 1024)}
    caching = GpuOptions(tensorrt=True, tensorrt_cache=Path("/cache"))
    cached = tensorrt_options(caching, EMBEDDED_MODEL, 16)
    assert cached == options | {
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": "/cache",
        "trt_engine_cache_prefix": hashlib.sha256(EMBEDDED_MODEL.read_bytes()).hexdigest()[:16],
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": "/cache",
    }


def without_room(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    """Let there be a GPU whose memory does not suffice for the batches' buffers."""
    session = onnxruntime.InferenceSession(EMBEDDED_MODEL, providers=[CPU])
    monkeypatch.setattr("app.engine.open_session", lambda *_: (session, CUDA))
    monkeypatch.setattr("app.engine.gpu_memory", lambda: CPU_MEMORY)
    monkeypatch.setattr("app.engine.Buckets", Mock(side_effect=RuntimeError(said)))


@pytest.mark.parametrize(
    ("said", "told", "mend"),
    [
        ("no memory\nstack", "no memory", "choose fewer"),
        (
            "bfc_arena.cc:360 void* AllocateRawInternal(size_t) Available memory of 5 is smaller "
            "than requested bytes of 9",
            "Available memory of 5 is smaller than requested bytes of 9",
            "choose fewer or a larger MIXER_GPU_MEMORY_MIB",
        ),
    ],
)
def test_no_room_for_buffers(
    said: str, told: str, mend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU without room for the batches' buffers stops the start-up in one line."""
    without_room(monkeypatch, said)
    with pytest.raises(StartupError) as raised:
        OnnxEngine(EMBEDDED_MODEL, "cuda", 1, max_batch=64)
    assert str(raised.value) == (
        f"MIXER_MAX_BATCH=64: CUDAExecutionProvider cannot run so many images at once ({told}); "
        f"{mend}"
    )


def test_auto_without_room(
    exact: OnnxEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With --device auto, a GPU that opens the model but cannot run it leaves it to the CPU."""
    without_room(monkeypatch, "no memory")
    engine = OnnxEngine(EMBEDDED_MODEL, "auto", 1, max_batch=64)
    assert engine.provider == CPU
    np.testing.assert_allclose(engine.run(draw(3)), exact.run(draw(3)), atol=1e-5)
    [line] = caplog.messages
    assert line.startswith("device auto: serving on the CPU, since MIXER_MAX_BATCH=64: CUDA")


def test_stacked_pictures_are_not_copied_again(exact: OnnxEngine, bucketed: OnnxEngine) -> None:
    """Pictures stacked for a device lie where it reads them, and answer as a batch does."""
    pictures = list(draw(3, seed=6))
    first, again = bucketed.stack(pictures), bucketed.stack(pictures[::-1])
    assert np.shares_memory(first, again)
    logits = bucketed.infer(again, Share(3))
    np.testing.assert_allclose(logits[::-1], exact.run(draw(3, seed=6)), atol=1e-5)


def test_nothing_is_copied_twice() -> None:
    """Of a padded batch its own images alone go to the device, and its own logits come back."""
    copied: list[int] = []

    def copy(to: int, source: int, size: int) -> None:
        copied.append(size)
        ctypes.memmove(to, source, size)

    session = onnxruntime.InferenceSession(EMBEDDED_MODEL, providers=[CPU])
    buckets = Buckets(session, 4, CPU_MEMORY._replace(copy=copy))
    stacked = buckets.stack(list(draw(3)))
    buckets._staging.flags.writeable = False  # they are there already
    for bucket in buckets._buckets:
        bucket._staging.flags.writeable = False
    buckets.run(stacked)
    assert copied == [3 * 64 * 48, 3 * 10 * 4]


def test_limit_that_an_inference_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the arena's limit is too small for one image, the line names the setting."""
    said = "bfc_arena.cc:360 Available memory of 5 is smaller than requested bytes of 9"
    monkeypatch.setattr(Shares, "run", Mock(side_effect=RuntimeError(said)))
    with pytest.raises(StartupError, match=r"bytes of 9\); choose a larger MIXER_GPU_MEMORY_MIB$"):
        OnnxEngine(EMBEDDED_MODEL, "cpu", 1)


def test_copy_that_cuda_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that fails on a GPU is an error with CUDA's number, never old logits."""
    runtime = Mock()
    runtime.cudaMemcpy.return_value = 700
    monkeypatch.setattr("ctypes.CDLL", lambda _: runtime)
    monkeypatch.setattr("app.memory._cuda_major", lambda: "13")
    with pytest.raises(RuntimeError, match=r"cannot copy 48 bytes \(error 700\)"):
        gpu_memory().copy(1, 2, 48)
    [asked] = runtime.cudaMemcpy.call_args_list
    assert [argument.value for argument in asked.args] == [1, 2, 48, 4]  # to, from, bytes, default
    runtime.cudaGetLastError.assert_called_once()  # or the next kernel would be told of it
