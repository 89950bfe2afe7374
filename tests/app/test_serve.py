"""The command `mixer-serve`: a real process, its start-up errors and its answers."""

import importlib
import logging
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import Context
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import httpx2
import numpy as np
import pytest
from PIL import Image

from app import serve, start
from app.cpus import available_cpus
from app.draining import DrainingServer
from app.engine import OnnxEngine
from app.errors import StartupError
from app.logs import JsonFormatter
from app.serve import _allow_descriptors, _check_threads
from app.settings import EMBEDDED_MODEL, Settings, read_settings
from app.trace import begin
from tests.fakes import encode, make_image
from tests.faults.load import dial, get, read_answer
from tests.processes import ROOT, clean_environment, run_serve, serving


def refusal(*arguments: str, **settings: str) -> str:
    """Return the one line with which start-up stops."""
    result = run_serve(*arguments, **settings)
    lines = [line for line in result.stderr.splitlines() if '"level":"warning"' not in line]
    assert result.returncode != 0
    assert result.stdout == ""
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("mixer-serve: ")
    return lines[0]


def test_serves_the_embedded_model(tmp_path: Path) -> None:
    """Without any flag the embedded CIFAR-10 Mixer is served, and stops on SIGINT with code 0."""
    sky = Image.fromarray(np.full((64, 64, 3), (120, 170, 240), np.uint8))
    with serving(tmp_path / "log") as server:
        form = httpx2.post(f"{server.url}/classify", files={"file": encode(sky, "JPEG")})
        raw = httpx2.post(
            f"{server.url}/classify",
            content=encode(sky, "JPEG"),
            headers={"Content-Type": "image/jpeg"},
        )
        card = httpx2.get(f"{server.url}/model").json()
        assert form.status_code == 200, form.text
        assert form.json() == raw.json()
        assert form.json()["predictions"][0]["label"] in ("airplane", "bird")
        assert card["execution_provider"] == "CPUExecutionProvider"
        assert card["labels"][3] == "cat"
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(10) == 0


def test_batched_and_single_answers_agree(tmp_path: Path, shared: Path) -> None:
    """An image's scores alone and inside a batch differ by less than 1e-5."""
    import tarfile

    with tarfile.open(shared / "data" / "photos.tar") as archive:
        members = [m for m in archive if m.isfile()][:32]
        photos = [archive.extractfile(m).read() for m in members]  # type: ignore[union-attr] # files
    with serving(tmp_path / "log") as server, httpx2.Client(base_url=server.url) as client:
        batch = client.post("/classify/batch?top_k=10", files=[("files", p) for p in photos])
        for photo, together in zip(photos, batch.json()["results"], strict=True):
            alone = client.post("/classify?top_k=10", content=photo).json()
            assert {p["index"]: p["score"] for p in alone["predictions"]} == pytest.approx(
                {p["index"]: p["score"] for p in together["predictions"]}, abs=1e-5
            )


def test_signals_are_heeded_before_the_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command listens to SIGTERM before it imports what serving needs: as PID 1 it must."""
    seen: list[object] = []

    def imported(name: str) -> SimpleNamespace:
        seen.extend((name, signal.getsignal(signal.SIGTERM)))
        return SimpleNamespace(main=lambda: 3)

    monkeypatch.setattr(importlib, "import_module", imported)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert start.main() == 3
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    name, heeded = seen
    assert name == "app.serve"
    assert callable(heeded)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_that_were_blocked(number: signal.Signals) -> None:
    """A signal that was blocked when the service was started ends it all the same."""
    script = (
        "import os, signal, sys\n"
        "from app import start\n"
        "number = int(sys.argv[1])\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [number])\n"
        "start.end_when_told()\n"
        "os.kill(os.getpid(), number)\n"
    )
    result = subprocess.run([sys.executable, "-c", script, str(int(number))], cwd=ROOT)
    assert result.returncode == 128 + number


def test_help_beside_an_unknown_setting() -> None:
    """`--help` comes where a variable is wrong, too: the line about that one points to it."""
    result = run_serve("--help", MIXER_FOO="1")
    assert result.returncode == 0
    assert "--max-batch" in result.stdout


def test_settings_in_lower_case() -> None:
    """A setting's name in lower case is refused, not passed over; another program's is not ours."""
    for name in ("mixer_max_batch", "Mixer_Max_Batch"):
        with pytest.raises(StartupError, match=f"{name}=8: no such setting"):
            read_settings([], {name: "8"})
    assert read_settings([], {"mixer_volume": "8"}) == Settings()


@pytest.mark.parametrize("told", ["Exception: std::bad_alloc", "error 12: Cannot allocate memory"])
def test_too_little_memory(monkeypatch: pytest.MonkeyPatch, told: str) -> None:
    """A model for which there is no memory is told as that, not as a broken one."""
    no_memory = Mock(side_effect=RuntimeError(told))
    monkeypatch.setattr("onnxruntime.InferenceSession", no_memory)
    with pytest.raises(StartupError, match="too little memory to load it; allow more"):
        OnnxEngine(EMBEDDED_MODEL, "cpu", 1)


def test_no_memory_to_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A start for which there is no memory ends in one line."""
    monkeypatch.setattr("app.serve.read_settings", Mock(side_effect=MemoryError))
    assert serve.main([]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "too little memory to start" in line


def test_help_explains_every_setting_with_its_default() -> None:
    """`--help` names every flag, its default and its variable's form."""
    result = run_serve("--help")
    assert result.returncode == 0
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in result.stdout
        if isinstance(field.default, int) and not isinstance(field.default, bool):
            assert f"default: {field.default})" in " ".join(result.stdout.split())
    assert "MIXER_MAX_BATCH" in result.stdout
    assert "one of debug, info, warning, error;" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("setting", "value", "allowed"),
    [
        ("PORT", "65536", "from 0 to 65535"),
        ("PORT", "http", "from 0 to 65535"),
        ("DEVICE", "gpu", "one of auto, cpu, cuda"),
        ("MAX_BATCH", "0", "from 1 to 4096"),
        ("THREADS", "1.5", "from 1 to 1024"),
        ("QUEUE_SIZE", "-1", "from 1 to 1000000"),
        ("MAX_UPLOAD_BYTES", "20MB", "from 1024"),
        ("DRAIN_DELAY_S", "nan", "from 0 to 3600"),
        ("HEADER_TIMEOUT_S", "0", "from 0.1 to 3600"),
        ("LOG_LEVEL", "loud", "one of debug"),
        ("MAX_BATCHES", "8", "no such setting"),
    ],
)
def test_bad_setting(setting: str, value: str, allowed: str) -> None:
    """A setting out of its range, or unknown, is one line with its name, value and range."""
    line = refusal(**{f"MIXER_{setting}": value})
    assert f"MIXER_{setting}={value}: " in line
    assert allowed in line


def test_settings_as_they_are_spelled() -> None:
    """Limits may be equal; a variable in other letters and a flag cut short are none of ours."""
    flags = ["--max-upload-bytes", "2000", "--max-bytes-in-flight", "2000"]
    assert read_settings(flags, {}).max_bytes_in_flight == 2000
    with pytest.raises(StartupError, match="MIXER_Port=1: no such setting"):
        read_settings([], {"MIXER_Port": "1"})
    with pytest.raises(SystemExit):
        read_settings(["--max-batc", "8"], {})


def test_bad_flag() -> None:
    """A flag out of its range, or unknown, is one line, and a flag wins over its variable."""
    assert "--max-batch 0: it must be a whole number from 1" in refusal("--max-batch", "0")
    assert "--no-such-flag" in refusal("--no-such-flag")
    assert "--max-batch 0" in refusal("--max-batch", "0", MIXER_MAX_BATCH="8")


class TestModelFile:
    """A model file that does not hold stops start-up."""

    def test_missing(self, tmp_path: Path) -> None:
        """A missing model file is named."""
        assert "no such file" in refusal("--model", str(tmp_path / "none.onnx"))

    @pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
    def test_truncated(self, tmp_path: Path, share: float) -> None:
        """A truncated model file is named, wherever it was cut."""
        whole = EMBEDDED_MODEL.read_bytes()
        path = tmp_path / "cut.onnx"
        path.write_bytes(whole[: int(len(whole) * share)])
        assert f"MIXER_MODEL={path}" in refusal("--model", str(path))

    def test_foreign(self, tmp_path: Path) -> None:
        """A file that is no ONNX model is named."""
        path = tmp_path / "photo.onnx"
        path.write_bytes(make_image())
        assert "onnxruntime can load" in refusal("--model", str(path))

    def test_without_card(self, tmp_path: Path) -> None:
        """An ONNX model that the exporter did not write is refused for its missing card."""
        onnx = pytest.importorskip("onnx", reason="onnx comes with the export extra")
        model = onnx.load(EMBEDDED_MODEL)
        del model.metadata_props[:]
        onnx.save(model, tmp_path / "bare.onnx")
        assert "no model card" in refusal("--model", str(tmp_path / "bare.onnx"))

    def test_damaged_weights(self, tmp_path: Path) -> None:
        """A model whose weights were damaged is caught by its golden sample."""
        onnx = pytest.importorskip("onnx", reason="onnx comes with the export extra")
        model = onnx.load(EMBEDDED_MODEL)
        largest = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        raw = bytearray(largest.raw_data)
        raw[1003] ^= 0x40  # the exponent of one float32 in a hundred thousand
        largest.raw_data = bytes(raw)
        onnx.save(model, tmp_path / "damaged.onnx")
        assert "golden sample" in refusal("--model", str(tmp_path / "damaged.onnx"))


def test_cuda_that_cannot_be_had() -> None:
    """`--device cuda` without CUDA stops start-up and says what is missing."""
    line = refusal("--device", "cuda")
    assert "MIXER_DEVICE=cuda: " in line
    assert "built without CUDA" in line or "libcuda.so.1" in line


def test_auto_says_why_it_is_the_cpu(tmp_path: Path) -> None:
    """`--device auto` without CUDA serves on the CPU with a warning that names the reason."""
    with serving(tmp_path / "log", "--device", "auto") as server:
        assert "serving on the CPU, since" in server.log.read_text()
        card = httpx2.get(f"{server.url}/model").json()
        assert card["execution_provider"] == "CPUExecutionProvider"


def test_port_taken() -> None:
    """A port that is taken is one line that names host and port."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refusal("--port", str(port))
    assert f"MIXER_PORT={port}: cannot listen there" in line


def test_port_of_one_just_stopped(tmp_path: Path) -> None:
    """A port whose last server stopped with connections open can be had again at once."""
    with serving(tmp_path / "first", "--drain-delay-s", "0") as server:
        port = server.url.rpartition(":")[2]
        with socket.create_connection(("127.0.0.1", int(port))):
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(10) == 0
    with serving(tmp_path / "second", "--port", port) as server:
        assert httpx2.get(f"{server.url}/livez").status_code == 200


def test_address_of_ipv6(tmp_path: Path) -> None:
    """An IPv6 address is listened on, and stands in the log as a browser takes it."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6")
    with serving(tmp_path / "log", "--host", "::1") as server:
        assert server.url.startswith("http://[::1]:")


@pytest.mark.parametrize("content", ["", "# only a comment\n"])
def test_useless_key_file(tmp_path: Path, content: str) -> None:
    """A file without any API key is refused, rather than locking everyone out or in."""
    path = tmp_path / "keys"
    path.write_text(content)
    assert "holds no key" in refusal("--api-keys-file", str(path))


def test_import_brings_neither_torch_nor_onnx() -> None:
    """Importing the application imports neither torch nor onnx."""
    code = "import app.main, sys; print(*sorted(m.split('.')[0] for m in sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"torch", "onnx", "onnxruntime"} & set(result.stdout.split())


def test_no_module_of_the_service_knows_the_exporter() -> None:
    """Nothing in `app` imports torch, onnx or model_export, not even where it is needed."""
    foreign = re.compile(r"^\s*(?:from|import) (?:torch|onnx|model_export)\b", re.MULTILINE)
    modules = list((ROOT / "app").rglob("*.py"))
    assert len(modules) > 50
    assert [path for path in modules if foreign.search(path.read_text(encoding="utf-8"))] == []


def test_signal_while_it_starts() -> None:
    """Until the model is warm the port is closed, and a signal ends the process at once."""
    script = (
        "import sys, time\n"
        "from app import main, serve\n"
        "def warm_up(*_):\n"
        "    print('warming', flush=True)\n"
        "    time.sleep(60)\n"
        "main.warm_up = warm_up\n"
        "serve.main(sys.argv[1:])\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with subprocess.Popen(
        [sys.executable, "-c", script, "--port", str(port)],
        cwd=ROOT,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "warming\n"
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port), timeout=5)
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 128 + signal.SIGTERM
        finally:
            process.kill()


def test_few_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where fewer descriptors are allowed, fewer connections are; where none is left, it stops."""
    settings = Settings(max_connections=1000, decode_threads=2)
    for hard in (400, 195):
        monkeypatch.setattr(resource, "getrlimit", lambda _, hard=hard: (hard, hard))
        assert _allow_descriptors(settings).max_connections == hard - 194
    monkeypatch.setattr(resource, "getrlimit", lambda _: (194, 194))
    with pytest.raises(StartupError, match="194 descriptors"):
        _allow_descriptors(settings)


def test_few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there cannot be as many threads as will be needed, start-up says so; none is left."""
    begin, allowed, before = threading.Thread.start, iter(range(90)), threading.active_count()

    def start_one(thread: threading.Thread) -> None:
        if next(allowed, None) is None:
            raise RuntimeError("can't start new thread")
        begin(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_one)
        with pytest.raises(StartupError, match=r"MIXER_THREADS=64 .*=5: .* 90 more .*ulimit -u"):
            _check_threads(Settings(threads=64, decode_threads=5))
    assert threading.active_count() == before
    _check_threads(Settings(threads=64, decode_threads=5))
    assert threading.active_count() == before


def test_threads_are_tried_before_the_model() -> None:
    """Start-up tries them, and the process of the decoders, before it can hang for want of them."""
    script = (
        "import sys, threading\n"
        "from unittest.mock import Mock\n"
        "from app import serve\n"
        "{}\n"
        "serve._open = None\n"
        "sys.exit(serve.main(['--port', '0']))\n"
    )
    for fault, line in (
        ("threading.Thread.start = Mock(side_effect=RuntimeError)", "MIXER_THREADS="),
        ("serve.nursery = Mock(side_effect=BlockingIOError(11, 'no more'))", "no more"),
    ):
        result = subprocess.run(
            [sys.executable, "-c", script.format(fault)],
            cwd=ROOT,
            env=clean_environment(),
            capture_output=True,
            text=True,
        )
        assert result.returncode == 1
        assert result.stderr.startswith("mixer-serve: ")
        assert line in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_onnxruntime_that_cannot_be_loaded(tmp_path: Path) -> None:
    """What keeps an installed onnxruntime from loading is named as it is."""
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libm.so: no memory')")
    assert refusal(PYTHONPATH=str(tmp_path)) == (
        "mixer-serve: onnxruntime cannot be loaded: libm.so: no memory"
    )


def test_cpus_without_affinity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On macOS, which has no affinity, all processors count."""
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert available_cpus(tmp_path) == os.cpu_count()


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities on Linux only")
@pytest.mark.parametrize("more", [0, 5])
def test_who_goes_first(tmp_path: Path, more: int) -> None:
    """The event loop goes before decoders, and those before the threads that infer, at any nice."""
    base = os.getpriority(os.PRIO_PROCESS, 0) + more
    if base + 12 > 19:
        pytest.skip("these tests run at a nice value that leaves no room below")
    flags = ("--device", "cpu", "--threads", "3", "--decode-threads", "2")
    with ExitStack() as stack:
        with ThreadPoolExecutor(1, initializer=os.nice, initargs=(more,)) as nicer:
            starting = nicer.submit(stack.enter_context, serving(tmp_path / "log", *flags))
            server = starting.result()
        own, nursery, *decoders = [nice_values(pid) for pid in server.pids()]
        loop = nice_values(server.process.pid, str(server.process.pid))
        for pid in server.pids()[1:]:
            os.kill(pid, signal.SIGKILL)
        for _ in range(4):  # a nursery comes anew, from a thread that gives way
            httpx2.post(f"{server.url}/classify", content=make_image())
        _, _, *replaced = [nice_values(pid) for pid in server.pids()]
    assert loop == nursery == [base]
    assert decoders == replaced == [[base + 10], [base + 10]]
    assert own.count(base + 10) == 2  # those that hand uploads to the decoders
    # Of the batches, and beside the caller as the model is checked.
    assert own.count(base + 12) == 3 + 2


def nice_values(pid: int, thread: str = "*") -> list[int]:
    """Return the nice values of a process's threads (proc(5), field 19 of stat)."""
    stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob(f"{thread}/stat")]
    return [int(stat.rpartition(")")[2].split()[16]) for stat in stats]


def test_signal_as_it_begins(tmp_path: Path) -> None:
    """Who connects before the decoders have started is answered, a signal in between or not."""
    (tmp_path / "slow.py").write_text(
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from app import serve\n"
        "from app.draining import DrainingServer\n"
        "start = DrainingServer.startup\n"
        "async def late(self, sockets=None):\n"
        "    print('late', flush=True)\n"
        "    while not Path(__file__).with_name('asked').exists():\n"
        "        await asyncio.sleep(0.01)\n"
        "    await start(self, sockets)\n"
        "DrainingServer.startup = late\n"
        "sys.exit(serve.main())\n"
    )
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "slow", "--port", "0", "--drain-delay-s", "0.2"],
            cwd=ROOT,
            env=clean_environment(PYTHONPATH=f"{tmp_path}:{ROOT}"),
            stdout=output,
            stderr=output,
        )
    try:
        while "late" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.01)
        url = re.search(r"http://[^\s\"]+:\d+", log.read_text())
        assert url is not None
        with dial(url[0]) as client:
            client.sendall(get("/livez"))
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)  # the time to drain is over as it starts
            (tmp_path / "asked").touch()
            answer = read_answer(client)
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"connection: close" in answer.lower()
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()


def test_draining_is_no_requests_matter() -> None:
    """The line that tells of a signal names no request, whichever it came upon."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(JsonFormatter().format(record))  # type: ignore[method-assign] # a list will do
    app = SimpleNamespace(state=SimpleNamespace(service=SimpleNamespace(draining=False)))
    server = DrainingServer(app, Settings())  # type: ignore[arg-type] # all of it that is looked at
    server.started = True
    logger = logging.getLogger("app.draining")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)

    def stop() -> None:
        begin("mine", "")
        logger.info("of this request")
        server.handle_exit(signal.SIGTERM, None)

    try:
        Context().run(stop)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert app.state.service.draining
    assert ["mine" in line for line in lines] == [True, False]
