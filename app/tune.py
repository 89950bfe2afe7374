"""The command `mixer-serve tune MODEL`: which batch size and threads are best on this machine.

Times the engine alone over batch sizes and, on the CPU, threads; prints the latency curve, writes
the settings it recommends as an env file, and draws the curve.
"""

import argparse
import re
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO, get_args

import numpy as np

from app.arguments import Arguments, number_within, prepare_streams, standard_output
from app.buckets import bucket_sizes
from app.cpus import available_cpus
from app.cuda import GpuOptions
from app.curve import Point, draw, table
from app.engine import Device, Engine, OnnxEngine, too_large
from app.errors import StartupError
from app.runtime import CPU
from app.settings import Settings

# Each point: at least so many runs and so long, for a median that a hiccup does not move.
MIN_RUNS = 5
MIN_SECONDS = 0.5
# Larger batches and more threads that gain less than this are not worth their latency and cores.
WORTH = 0.05
# Each batch costs the service some time besides the engine's: the embedded model's throughput with
# batches of 4 is a tenth below that with 16, though the engine is as fast. So none smaller than the
# default is recommended for its size alone: no batch waits for images that would fill it.
USUAL_BATCH: int = Settings.model_fields["max_batch"].default
_SHELLS = re.compile(r"[\s'\"$`\\;&|<>()]")  # more than themselves in an assignment
BAR_CELLS = 24


def main(arguments: Sequence[str]) -> int:
    """Measure, print, write and draw; return the exit code."""
    prepare_streams()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # start.py's ends without a word
    options = _parser().parse_args(arguments)
    curve = options.output.with_suffix(".png")
    try:
        _check_device(options)
        for path in (options.output, curve):  # a sweep may take minutes
            _check_writable(path.resolve())  # where a link leads
        for path in filter(None, (options.model, options.tensorrt_cache)):
            _check_legible(path.resolve())
        points, device = sweep(options)
        best = recommend(points, options.latency_ms)
        settings: dict[str, object] = {
            "MIXER_MODEL": options.model.resolve(),
            "MIXER_DEVICE": device,
            "MIXER_THREADS": best.threads,
            "MIXER_MAX_BATCH": best.batch,
        }
        if options.gpu_memory_mib and device != "cpu":
            settings["MIXER_GPU_MEMORY_MIB"] = options.gpu_memory_mib
        if options.tensorrt_cache:
            settings["MIXER_TENSORRT_CACHE"] = options.tensorrt_cache.resolve()
        lines = [f"{name}={value}" for name, value in settings.items()]
        options.output.write_text("\n".join(lines) + "\n", "utf-8", "surrogateescape")
        _print(table(points, best), *lines, f"written to {options.output}")
        if 2 * best.latency_ms > options.latency_ms:
            _print(
                f"nothing fits in {options.latency_ms:g} ms: this is the fastest single image; a "
                "longer --latency-ms allows batches"
            )
        elif best.images_per_s < max(point.images_per_s for point in points):
            _print(
                f"what is faster gains less than {WORTH:.0%}, "
                f"or a batch and the one before it take over {options.latency_ms:g} ms"
            )
        _print(draw(points, best, curve))
    except StartupError as error:
        sys.stderr.write(f"mixer-serve: {error}\n")
        return 1
    except OSError as error:
        name = error.filename or options.output
        sys.stderr.write(f"mixer-serve: --output {name}: {error.strerror}; name another file\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nmixer-serve: stopped\n")
        return 130
    return 0


def sweep(options: argparse.Namespace) -> tuple[list[Point], str]:
    """Return a point for each number of threads and batch size, and the device they ran on.

    Raises:
        StartupError: the model or the device cannot be had.
    """
    device: Device = options.device
    engine = _open(options, device, available_cpus())
    chosen: Device = device if engine.provider != CPU else "cpu"
    # On a GPU the threads of the CPU have nothing to do, and TensorRT takes minutes to open.
    threads = bucket_sizes(available_cpus()) if chosen == "cpu" else (1,)
    sizes = bucket_sizes(options.max_batch)
    points: list[Point] = []
    progress = _Progress(len(threads) * len(sizes), sys.stderr)
    for count in threads:
        if chosen == "cpu":
            engine = _open(options, chosen, count)
        for batch in sizes:
            progress.step(f"{count} threads, batch {batch}")
            try:
                points.append(Point(count, batch, _latency_ms(engine, batch)))
            except Exception as error:  # onnxruntime raises a class of its own for each status
                if batch == 1:
                    raise too_large(batch, engine.provider, error) from error
                break  # no room for more of them
    progress.end()
    return points, "cuda" if chosen == "auto" else chosen


def recommend(points: Sequence[Point], latency_ms: float) -> Point:
    """Return the point to serve with: the most images per second within the latency.

    An image that comes while a batch runs waits for it first, so two batches must fit. Among points
    within `WORTH` of the best the one of fewest threads, then of the batch nearest to the default.
    Where not even one image fits, the fastest single image.
    """
    fitting = [point for point in points if 2 * point.latency_ms <= latency_ms]
    if not fitting:
        return min(points, key=lambda point: (point.batch, point.latency_ms))
    most = max(point.images_per_s for point in fitting)
    worthy = [point for point in fitting if point.images_per_s >= (1 - WORTH) * most]
    return min(worthy, key=lambda point: (point.threads, abs(point.batch - USUAL_BATCH)))


def _latency_ms(engine: Engine, batch: int) -> float:
    preprocessing = engine.card.preprocessing
    shape = (batch, preprocessing.tokens, preprocessing.patch_bytes)
    patches = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    engine.run(patches)  # the first run of a size allocates, and captures the graph on a GPU
    return statistics.median(_runs_ms(engine, patches))


def _runs_ms(engine: Engine, patches: "np.typing.NDArray[np.uint8]") -> Iterator[float]:
    begin, runs = time.perf_counter(), 0
    while runs < MIN_RUNS or time.perf_counter() < begin + MIN_SECONDS:
        start = time.perf_counter()
        engine.run(patches)
        yield (time.perf_counter() - start) * 1000
        runs += 1


def _open(options: argparse.Namespace, device: Device, threads: int) -> OnnxEngine:
    gpu = GpuOptions(options.gpu_memory_mib, options.tensorrt_cache)
    return OnnxEngine(options.model, device, threads, max_batch=options.max_batch, gpu=gpu)


def _check_device(options: argparse.Namespace) -> None:
    """Raise StartupError where something is given for another device, as the server does."""
    gpu = GpuOptions(options.gpu_memory_mib, options.tensorrt_cache)
    if (name := gpu.passed_over(options.device)) is not None:
        flag = f"--{name.replace('_', '-')} {vars(options)[name]}"
        raise StartupError(f"{flag}: it means nothing with --device {options.device}")


def _check_writable(path: Path) -> None:
    """Raise OSError if a file cannot be written there; what is there stays as it is."""
    is_new = not path.exists()
    path.open("a").close()
    if is_new:
        path.unlink()


def _check_legible(path: Path) -> None:
    """Raise StartupError if a shell would read the path in an env file otherwise than docker."""
    if _SHELLS.search(str(path)):
        raise StartupError(
            f"{str(path)!r}: a shell would read it otherwise than docker from an env file; choose "
            "a name without spaces, quotes and signs of the shell"
        )


class _Progress:
    """One line that is written over, on a terminal only."""

    def __init__(self, total: int, stream: TextIO) -> None:
        self._total = total
        self._done = 0
        self._stream = stream

    def step(self, what: str) -> None:
        """Say what is being measured."""
        if self._stream.isatty():
            cells = BAR_CELLS * self._done // self._total
            bar = "#" * cells + "." * (BAR_CELLS - cells)
            self._stream.write(f"\r\x1b[K[{bar}] {self._done}/{self._total} {what}")
            self._stream.flush()
        self._done += 1

    def end(self) -> None:
        """Clear the line."""
        if self._stream.isatty():
            self._stream.write("\r\x1b[K")


def _env_file(text: str) -> Path:
    path = Path(text)
    if not path.name:
        raise argparse.ArgumentTypeError(f"'{text}' is not the name of a file")
    if path.suffix == ".png":
        raise argparse.ArgumentTypeError(f"'{text}' would be the curve's name: end it otherwise")
    return path


def _print(*lines: str) -> None:
    with standard_output("mixer-serve"):
        sys.stdout.write("\n".join(lines) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="mixer-serve tune",
        description="Time a model on this machine, and write the settings that suit both.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="an .onnx of mixer-export")
    parser.add_argument(
        "--device", choices=get_args(Device), default="auto", help="as for serving (default: auto)"
    )
    parser.add_argument(
        "--max-batch",
        type=number_within(int, 1, 4096),
        default=64,
        metavar="IMAGES",
        help="largest batch that is tried, 1 to 4096 (default: 64)",
    )
    parser.add_argument(
        "--latency-ms",
        type=number_within(float, 0.001, 600_000),
        default=200.0,
        metavar="MS",
        help="longest wait and inference together that may be recommended (default: 200)",
    )
    parser.add_argument(
        "--gpu-memory-mib",
        type=number_within(int, 0, 2**20),
        default=0,
        metavar="MIB",
        help="as for serving (default: no limit)",
    )
    parser.add_argument(
        "--tensorrt-cache", type=Path, metavar="FOLDER", help="as for serving (default: none)"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=_env_file,
        default=Path("mixer-serve.env"),
        metavar="FILE",
        help="env file to write; the curve goes beside it as .png (default: mixer-serve.env)",
    )
    return parser
