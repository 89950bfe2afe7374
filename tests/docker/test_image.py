"""The images, built and run for real: `make image-test`."""

import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.docker import containers
from tests.docker.images import NEEDED, Image, Store, disk_bytes, temporary_store
from tests.fakes import make_image

WANTED = os.environ.get("IMAGE_TEST", "").split()
MISSING = [tool for tool in NEEDED if shutil.which(tool) is None]
if not WANTED:
    pytest.skip("builds images for minutes: make image-test", allow_module_level=True)
pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or bool(MISSING), reason=f"needs root; not installed: {MISSING}"
)

SUITE = os.environ.get("IMAGE_TEST_SUITE", "trixie")  # Debian 13, as in the Dockerfile
MEGABYTE = 1_000_000
CPU_LIMIT_BYTES = 350 * MEGABYTE  # over its base; what the product promises
REFUSAL_S = 10.0  # a GPU that cannot be had is told of within this time
PHOTO = make_image((20, 90, 200), "JPEG", side=320)


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    """Return a store with a fresh Debian in it."""
    with temporary_store() as store:
        store.bootstrap(SUITE)
        yield store


@pytest.fixture(scope="module")
def base(store: Store) -> Iterator[Image]:
    """Return the base image."""
    with store.opened("localhost/base") as image:
        yield image


@pytest.fixture(scope="module")
def cpu(store: Store) -> Iterator[Image]:
    """Return the CPU image."""
    yield from _built(store, "cpu")


@pytest.fixture(scope="module")
def gpu(store: Store) -> Iterator[Image]:
    """Return the GPU image."""
    yield from _built(store, "gpu")


@pytest.fixture(params=["cpu", "gpu"])
def image(request: pytest.FixtureRequest) -> Image:
    """Return each image in turn."""
    found: Image = request.getfixturevalue(request.param)
    return found


def test_runs_as_a_number_and_without_a_shell(image: Image) -> None:
    """The image's user is a number above 0, and its command and health check need no shell."""
    assert int(image.config["User"].partition(":")[0]) > 0
    assert image.config["Cmd"] == ["mixer-serve"]
    assert image.config["Healthcheck"]["Test"][0] == "CMD"
    assert (image.files / "opt/mixer/bin/mixer-serve").is_file()


def test_says_what_it_is(image: Image) -> None:
    """The OCI labels name title, version and license."""
    prefix = "org.opencontainers.image."
    labels = image.config["Labels"]
    assert labels[f"{prefix}title"] == "Mixer Serve"
    (metadata,) = image.packages.glob("mixer_serve-*.dist-info/METADATA")
    assert f"\nVersion: {labels[f'{prefix}version']}\n" in metadata.read_text()
    assert labels[f"{prefix}licenses"] == "Apache-2.0"


def test_holds_nothing_that_serving_does_not_need(image: Image) -> None:
    """No torch, exporter, pip, compiler, cache, test or checkpoint is inside."""
    unwanted = [f"{name}*" for name in ("torch", "model_export", "onnx-", "pip", "setuptools")]
    assert [found for name in unwanted for found in image.packages.glob(name)] == []
    assert [found for found in image.packages.rglob("tests") if found.is_dir()] == []
    assert list(image.packages.rglob("*.safetensors")) == []
    programs = {found.name for found in image.files.glob("*/bin/*")}
    assert programs.isdisjoint({"gcc", "cc", "g++", "make", "pip", "pip3"})
    assert not (image.files / "src").exists()
    assert not (image.files / "build").exists()
    for cache in ("root/.cache", "var/cache/apt/archives", "var/lib/apt/lists"):
        assert list(image.files.glob(f"{cache}/*.*")) == []


def test_the_cpu_image_is_small(cpu: Image, base: Image) -> None:
    """The CPU image takes at most 350 MB more than its base."""
    added = disk_bytes(cpu.files) - disk_bytes(base.files)
    _report(
        f"cpu: {added / MEGABYTE:.0f} MB over a base of {disk_bytes(base.files) / MEGABYTE:.0f}"
    )
    assert added <= CPU_LIMIT_BYTES


def test_classifies_locked_down(cpu: Image) -> None:
    """Read-only, without privileges or shell, the container classifies a photo."""
    with containers.running(cpu, _free_port()) as container:
        answer = httpx2.post(f"{container.url}/classify", files={"file": PHOTO})
        assert answer.status_code == httpx2.codes.OK
        assert len(answer.json()["predictions"]) == 5
        assert set(container.status("Uid").split()) == {cpu.config["User"].partition(":")[0]}
        assert container.status("NoNewPrivs") == "1"
        assert int(container.status("CapEff"), 16) == 0
        for path in ("/opt/mixer/x", "/models/x", "/x"):
            wrote = container.run("touch", path)
            assert "Read-only file system" in wrote.stderr
        assert container.run("sh", "-c", "true").returncode != 0


def test_the_health_check_tells_life_from_death(cpu: Image) -> None:
    """The image's health check passes while it serves, and fails where nobody listens."""
    command = cpu.config["Healthcheck"]["Test"][1:]
    with containers.running(cpu, _free_port()) as container:
        assert container.run(*command).returncode == 0
        container.url = f"http://127.0.0.1:{_free_port()}"
        assert container.run(*command).returncode == 1


def test_sigterm_drains(cpu: Image) -> None:
    """After SIGTERM readiness fails, requests are served on, then process 1 exits with 0."""
    with containers.running(cpu, _free_port(), MIXER_DRAIN_DELAY_S="2") as container:
        os.kill(container.pid, 15)
        time.sleep(0.2)
        assert httpx2.get(f"{container.url}/readyz").status_code == 503
        answer = httpx2.post(f"{container.url}/classify", content=PHOTO, headers=JPEG)
        assert answer.status_code == httpx2.codes.OK
        assert answer.headers["connection"] == "close"
        assert container.process.wait(timeout=10) == 0


def test_a_mounted_model_is_the_one_that_is_served(cpu: Image, tmp_path: Path) -> None:
    """A file mounted at /models/model.onnx replaces the embedded model, so a broken one stops."""
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    mount = (tmp_path / "model.onnx", "/models/model.onnx")
    process = containers.start(cpu, {"MIXER_PORT": "0"}, mount=mount)
    _, lines = containers.finish(process)
    assert process.returncode == 1
    assert "MIXER_MODEL=/models/model.onnx" in lines[0]
    assert len(lines) == 1


def test_the_gpu_image_has_every_library_but_the_drivers(gpu: Image) -> None:
    """Of what the CUDA provider links to, only the driver's libcuda.so.1 is not in the image."""
    check = Path(__file__).with_name("unresolved.py").read_text()
    found, errors = containers.finish(containers.start(gpu, command=["python3", "-c", check]))
    assert found.split() == ["libcuda.so.1"], errors


def test_the_gpu_image_refuses_to_run_without_a_gpu(gpu: Image) -> None:
    """Without a driver the GPU image exits with one line that says what is missing."""
    began = time.monotonic()
    process = containers.start(gpu)
    _, lines = containers.finish(process)
    assert process.returncode not in (0, None)
    assert time.monotonic() - began < REFUSAL_S
    assert len(lines) == 1
    assert "libcuda.so.1" in lines[0]


def test_the_gpu_images_bytes_are_accounted_for(gpu: Image, base: Image) -> None:
    """NVIDIA's libraries and onnxruntime are nine tenths of what the GPU image adds."""
    added = disk_bytes(gpu.files) - disk_bytes(base.files)
    _report(f"gpu: {added / MEGABYTE:.0f} MB over its base")
    libraries = sorted(gpu.packages.rglob("*.so*"), key=lambda file: -file.stat().st_size)
    for library in libraries[:12]:
        _report(f"  {library.stat().st_size / MEGABYTE:5.0f} MB {library.name}")
    heavy = disk_bytes(gpu.packages / "nvidia") + disk_bytes(gpu.packages / "onnxruntime")
    assert heavy >= 0.9 * added


JPEG = {"Content-Type": "image/jpeg"}


def _report(line: str) -> None:
    sys.stdout.write(f"\n{line}")


def _built(store: Store, target: str) -> Iterator[Image]:
    if target not in WANTED:
        pytest.skip(f"make image-test IMAGES={target} builds this image")
    began = time.monotonic()
    store.build(target)
    _report(f"{target}: built in {time.monotonic() - began:.0f} s")
    with store.opened(target) as image:
        yield image


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
