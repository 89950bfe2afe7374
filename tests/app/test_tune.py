"""`mixer-serve tune MODEL`: what it measures, recommends, writes and draws."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest

from app import tune
from app.curve import Point, draw
from app.settings import EMBEDDED_MODEL, read_settings
from app.tune import recommend
from tests.outputs import CLOSED, buffered, check_output, run_closed
from tests.processes import cpu_s


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command."""
    return subprocess.run(
        [sys.executable, "-m", "app.serve", "tune", *arguments],
        env=buffered(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_tunes_the_embedded_model(tmp_path: Path) -> None:
    """The settings it writes are settings of the server, and the curve is a PNG beside them."""
    output = tmp_path / "tuned.env"
    done = run(str(EMBEDDED_MODEL), "--device", "cpu", "--max-batch", "2", "-o", str(output))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("<- recommended") == 1
    environment = dict(line.split("=", 1) for line in output.read_text().splitlines())
    settings = read_settings([], environment)
    assert settings.model == EMBEDDED_MODEL.resolve()
    assert settings.device == "cpu"
    assert settings.max_batch in (1, 2)
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("asked", "found"), [("auto", "cpu"), ("auto", "cuda"), ("tensorrt", "tensorrt")]
)
def test_settings_of_a_gpu(
    asked: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was asked of the GPU is written if the model runs there."""
    monkeypatch.setattr(tune, "sweep", Mock(return_value=([Point(1, 1, 1.0)], found)))
    output, cache = tmp_path / "tuned.env", tmp_path / "cache"
    flags = ["--device", asked, "--gpu-memory-mib", "512", "-o", str(output)]
    flags += ["--tensorrt-cache", str(cache)] if asked == "tensorrt" else []
    assert tune.main([str(EMBEDDED_MODEL), *flags]) == 0
    lines = output.read_text().splitlines()
    settings = read_settings([], dict(line.split("=", 1) for line in lines))
    assert settings.device == found
    assert settings.gpu_memory_mib == (0 if found == "cpu" else 512)
    assert settings.tensorrt_cache == (cache.resolve() if found == "tensorrt" else None)


@pytest.mark.parametrize("flags", [("--gpu-memory-mib", "9"), ("--tensorrt-cache", "cache")])
def test_settings_of_another_device(flags: tuple[str, str], tmp_path: Path) -> None:
    """What the device would pass over is told before anything is measured."""
    done = run(str(EMBEDDED_MODEL), "--device", "cpu", *flags, "-o", str(tmp_path / "tuned.env"))
    assert done.returncode == 1
    told = f"mixer-serve: {' '.join(flags)}: it means nothing with --device cpu\n"
    assert done.stderr == told
    assert list(tmp_path.iterdir()) == []


def test_missing_model_is_one_line(tmp_path: Path) -> None:
    """A model that is not there is refused in one line, and nothing is written."""
    output = tmp_path / "tuned.env"
    done = run(str(tmp_path / "none.onnx"), "-o", str(output))
    assert done.returncode == 1
    assert done.stderr.startswith("mixer-serve: MIXER_MODEL=")
    assert done.stderr.count("\n") == 1
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--no\npe"], "unrecognized arguments: --no pe;"),
        (["--max-batch", "0"], "'0' is not a number from 1 to 4096"),
        (["--max-batch", "two"], "'two' is not a number from 1 to 4096"),
        (["--latency-ms", "nan"], "'nan' is not a number from 0.001 to 600000"),
        (["--latency-ms", "-5"], "'-5' is not a number from 0.001 to 600000"),
        (["-o", ""], "'' is not the name of a file"),
        (["-o", "/"], "'/' is not the name of a file"),
        (["-o", "curve.png"], "'curve.png' would be the curve's name: end it otherwise"),
    ],
)
def test_wrong_argument_is_one_line(arguments: list[str], reason: str) -> None:
    """An argument that cannot be is refused in one line before anything is measured."""
    done = run(str(EMBEDDED_MODEL), *arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert reason in done.stderr


@pytest.mark.parametrize("taken", ["tuned.env", "tuned.png"])
def test_what_cannot_be_written_is_said_first(tmp_path: Path, taken: str) -> None:
    """A file that cannot be written stops the command in one line, before the sweep."""
    (tmp_path / taken).mkdir()
    done = run(str(tmp_path / "none.onnx"), "-o", str(tmp_path / "tuned.env"))
    assert done.returncode == 1
    assert done.stderr == (
        f"mixer-serve: --output {tmp_path / taken}: Is a directory; name another file\n"
    )


def test_no_room_for_large_batches(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A batch for which there is no memory ends the sweep's curve, not the sweep."""

    def latency_ms(_: object, batch: int) -> float:
        if batch > room:
            raise RuntimeError("Failed to allocate memory\nstack")
        return float(batch)

    monkeypatch.setattr(tune, "_latency_ms", latency_ms)
    monkeypatch.setattr(tune, "available_cpus", lambda: 1)
    command = [str(EMBEDDED_MODEL), "--device", "cpu", "-o", str(tmp_path / "tuned.env")]
    room = 4
    assert tune.main(command) == 0
    assert "MIXER_MAX_BATCH=4\n" in (tmp_path / "tuned.env").read_text()
    room = 0
    assert tune.main(command) == 1
    assert capsys.readouterr().err == (
        "mixer-serve: MIXER_MAX_BATCH=1: CPUExecutionProvider cannot run so many images at once "
        "(Failed to allocate memory); choose fewer\n"
    )


def test_interrupted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Ctrl+C ends the sweep with one line, and nothing is written."""
    monkeypatch.setattr(tune, "sweep", Mock(side_effect=KeyboardInterrupt))
    assert tune.main([str(EMBEDDED_MODEL), "-o", str(tmp_path / "tuned.env")]) == 130
    assert capsys.readouterr().err == "\nmixer-serve: stopped\n"
    assert list(tmp_path.iterdir()) == []


def test_interrupted_on_the_way(tmp_path: Path) -> None:
    """The installed command is ended by Ctrl+C with that line, too."""
    command = [sys.executable, "-c", "import sys; from app.start import main; sys.exit(main())"]
    output = str(tmp_path / "tuned.env")
    with subprocess.Popen(
        [*command, *f"tune --device cpu --max-batch 4096 -o {output}".split(), EMBEDDED_MODEL],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        give_up = time.monotonic() + 60
        while cpu_s(process.pid) < 5:  # imports take one
            assert time.monotonic() < give_up
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr is not None
        assert process.stderr.read() == "\nmixer-serve: stopped\n"
    assert list(tmp_path.iterdir()) == []


def test_nothing_fits(tmp_path: Path) -> None:
    """Where not even one image fits into the latency, the report says so."""
    output = tmp_path / "tuned.env"
    done = run(str(EMBEDDED_MODEL), "--max-batch", "1", "--latency-ms", "0.01", "-o", str(output))
    assert "nothing fits in 0.01 ms: this is the fastest single image; a longer" in done.stdout


@pytest.mark.parametrize("has_help", [False, True])
def test_output_that_takes_nothing(tmp_path: Path, has_help: bool) -> None:
    """A reader that has seen enough ends the command without a word, a full disk in one line."""
    arguments = [str(EMBEDDED_MODEL), "--device", "cpu", "--max-batch", "1"]
    arguments += ["-o", str(tmp_path / "tuned.env")]
    command = ("-m", "app.serve", "tune", *(["--help"] if has_help else arguments))
    check_output(*command)


@pytest.mark.parametrize("closed", CLOSED)
def test_closed_streams(tmp_path: Path, closed: str) -> None:
    """The settings are written, whichever of the standard streams are closed."""
    output = tmp_path / "tuned.env"
    options = ["--device", "cpu", "--max-batch", "1", "-o", str(output)]
    done = run_closed(closed, "-m", "app.serve", "tune", str(EMBEDDED_MODEL), *options)
    assert (done.returncode, done.stderr) == (0, "")
    assert "MIXER_MAX_BATCH=1\n" in output.read_text()
    for command in (["tune", "--help"], ["--help"]):
        assert run_closed(closed, "-m", "app.serve", *command).returncode == 0


def test_missing_matplotlib_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without matplotlib the curve is left out, and the report says so and how to get it."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    point = Point(threads=1, batch=1, latency_ms=1.0)
    said = draw([point], point, tmp_path / "curve.png")
    assert said == "no curve drawn: matplotlib is missing (pip install '.[export]')"
    assert not (tmp_path / "curve.png").exists()


POINTS = [
    Point(threads=1, batch=1, latency_ms=10),  # 100 images/s
    Point(threads=1, batch=8, latency_ms=50),  # 160
    Point(threads=1, batch=16, latency_ms=98),  # 163
    Point(threads=2, batch=8, latency_ms=26),  # 308
    Point(threads=2, batch=16, latency_ms=51),  # 314
    Point(threads=2, batch=32, latency_ms=110),  # 291
]


@pytest.mark.parametrize(
    ("latency_ms", "threads", "batch"),
    [
        pytest.param(1000, 2, 16, id="8 would be worth as much to the engine alone"),
        pytest.param(60, 2, 8, id="two batches fit"),
        pytest.param(40, 1, 1, id="only single images fit"),
        pytest.param(5, 1, 1, id="nothing fits: the fastest single image"),
    ],
)
def test_recommendation(latency_ms: float, threads: int, batch: int) -> None:
    """The most images per second within the latency, by few threads and the usual batch."""
    best = recommend(POINTS, latency_ms)
    assert (best.threads, best.batch) == (threads, batch)


@pytest.mark.parametrize(
    ("latencies_ms", "batch"),
    [
        ({8: 4, 16: 8, 32: 15.5, 64: 30.5}, 16),
        ({8: 4, 16: 8, 32: 12, 64: 24}, 32),
        ({1: 1, 2: 1.5, 4: 3, 8: 6}, 8),
    ],
)
def test_batch_worth_its_size(latencies_ms: dict[int, float], batch: int) -> None:
    """A batch is larger than usual where that gains something, smaller where it has to be."""
    points = [Point(1, size, latency_ms) for size, latency_ms in latencies_ms.items()]
    assert recommend(points, 1000).batch == batch


@pytest.mark.parametrize(("latency_ms", "is_said"), [("60", True), ("1000", False)])
def test_why_not_the_fastest(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    latency_ms: str,
    is_said: bool,
) -> None:
    """Where something faster than what is recommended was measured, the report says why not it."""
    monkeypatch.setattr(tune, "sweep", Mock(return_value=(POINTS, "cpu")))
    options = ["--latency-ms", latency_ms, "-o", str(tmp_path / "tuned.env")]
    assert tune.main([str(EMBEDDED_MODEL), *options]) == 0
    said = "what is faster gains less than 5%, or a batch and the one before it take over "
    assert (f"{said}{latency_ms} ms\n" in capsys.readouterr().out) == is_said


@pytest.mark.parametrize("name", ["two words", "$HOME", "a'b", "a\nMIXER_THREADS=9"])
def test_paths_that_a_shell_reads_otherwise(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    name: str,
) -> None:
    """A model whose path a shell would not read from the env file as docker does is refused."""
    monkeypatch.setattr(tune, "sweep", Mock(return_value=(POINTS, "cpu")))
    model = tmp_path / f"{name}.onnx"
    model.write_bytes(b"")
    output = tmp_path / "tuned.env"
    assert tune.main([str(model), "-o", str(output)]) == 1
    assert "a shell would read it otherwise" in capsys.readouterr().err
    assert not output.exists()
    model.rename(tmp_path / "plain-1.0.onnx")
    assert tune.main([str(tmp_path / "plain-1.0.onnx"), "-o", str(output)]) == 0


def test_links_are_kept(tmp_path: Path) -> None:
    """An output that is a link to nothing is still that link when no sweep has begun."""
    output = tmp_path / "tuned.env"
    output.symlink_to(tmp_path / "elsewhere.env")
    assert tune.main([str(tmp_path / "none.onnx"), "-o", str(output)]) == 1
    assert output.is_symlink()
    assert not output.exists()


def test_paths_that_are_no_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A path that is no UTF-8 is written as it is, and shown as well as can be."""
    monkeypatch.setattr(tune, "sweep", Mock(return_value=(POINTS, "tensorrt")))
    file, cache = tmp_path / "\udce9.env", tmp_path / "\udce8"
    options = ["-o", str(file), "--device", "tensorrt", "--tensorrt-cache", str(cache)]
    assert tune.main([str(EMBEDDED_MODEL), *options]) == 0
    assert b"/\xe8\n" in file.read_bytes()
    shown = capsys.readouterr().out
    assert "/\\udce8\n" in shown
    assert "/\\udce9.env\n" in shown


def test_fewer_threads_where_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that gain less than WORTH are left to decoding."""
    points = [Point(1, 8, 50), Point(2, 8, 49)]
    assert recommend(points, 1000).threads == 1
    monkeypatch.setattr(tune, "WORTH", 0.0)
    assert recommend(points, 1000).threads == 2
