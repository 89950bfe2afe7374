"""One visit to one server: start it, load it in several ways, read its CPU and memory."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from tests.benchmarks.peers import Server
from tests.benchmarks.processes import ROOT, BenchmarkError, Running, running

Figures = dict[str, Any]
# Connections of the open loop: enough that a due request rarely waits for a free one.
OPEN_LOOP_CONNECTIONS = 128
WARM_UP_S = 1.0
OBJECTIVE_MS = 200.0  # of the goodput: p99 at most this
FAILURES_ALLOWED = 0.01
HALVINGS = 3  # of the step between two rates, a tenth of the fastest server's throughput


@dataclass(frozen=True)
class Bench:
    """What all visits of one run share."""

    environments: dict[str, Path]  # by server
    bodies: dict[str, list[Path]]  # by server, its request bodies
    photo: bytes
    label: str  # that the model finds in it
    variables: dict[str, str]  # BENCH_… for every server
    seconds: float  # of one load
    long_seconds: float  # of one that fills batches, which a large model takes long for


def closed_loops(bench: Bench, server: Server, connections: tuple[int, ...]) -> Figures:
    """Return start, memory, and for each number of connections rate, CPU and latency."""
    with _visit(bench, server) as running_server:
        loops = {
            str(count): _load(bench, server, running_server, count, 0.0) for count in connections
        }
        return {
            "ready_s": running_server.ready_s,
            "pss_bytes": running_server.pss_bytes(),
            "closed": loops,
        }


def open_loops(bench: Bench, server: Server, rates: list[float]) -> Figures:
    """Return latency and answers at each constant rate of requests per second, and the goodput."""
    with _visit(bench, server) as running_server:

        def load(rate: float) -> Figures:
            return _load(bench, server, running_server, OPEN_LOOP_CONNECTIONS, rate)

        loads = {f"{rate:g}": load(rate) for rate in rates}
        return {
            "rates": loads,
            "goodput_per_s": goodput({float(rate): found for rate, found in loads.items()}, load),
        }


def goodput(loads: dict[float, Figures], load: Callable[[float], Figures]) -> float:
    """Return the rate to which a server answers within the objective, 0 if it does at none.

    Between the first rate of `loads` that it fails, and fails again, and the one before, or none at
    all, halves are tried by `load`.
    """
    kept = 0.0
    for rate in sorted(loads):
        if not _is_within_objective(loads[rate]) and not _is_within_objective(load(rate)):
            break
        kept = rate
    else:
        return kept
    failed = rate
    for _ in range(HALVINGS):
        middle = (kept + failed) / 2
        if _is_within_objective(load(middle)):
            kept = middle
        else:
            failed = middle
    return kept


def _is_within_objective(figures: Figures) -> bool:
    is_quick: bool = figures["p99_ms"] <= OBJECTIVE_MS
    return is_quick and figures["failed"] <= FAILURES_ALLOWED * figures["answered"]


def front_end(bench: Bench, server: Server, cores: frozenset[int]) -> Figures:
    """Return what the server feeds when it may use only `cores`."""
    with running(
        server, bench.environments[server.name], bench.variables, bench.photo, "", cores
    ) as running_server:
        _load(bench, server, running_server, 32, 0.0, WARM_UP_S)
        return _load(bench, server, running_server, 32, 0.0)


def _visit(bench: Bench, server: Server) -> Any:
    environment = bench.environments[server.name]
    return running(server, environment, bench.variables, bench.photo, bench.label)


def _load(
    bench: Bench,
    server: Server,
    target: Running,
    connections: int,
    rate: float,
    seconds: float | None = None,
) -> Figures:
    if seconds is None:
        _load(bench, server, target, connections, rate, WARM_UP_S)
    job = {
        "port": target.port,
        "head": server.head(target.port),
        "bodies": [str(path) for path in bench.bodies[server.name]],
        "seconds": seconds or (bench.seconds if connections == 1 else bench.long_seconds),
        "connections": connections,
        "rate": rate,
    }
    with tempfile.TemporaryDirectory() as folder:
        asked, told = Path(folder) / "job.json", Path(folder) / "result.json"
        asked.write_text(json.dumps(job))
        before, batches_before = target.cpu_s(), _batches(server, target)
        done = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.load", str(asked), str(told)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        cpu_s = target.cpu_s() - before
        if done.returncode:
            raise BenchmarkError(f"the load on {server.name} failed: {done.stderr.strip()[-300:]}")
        images, batches = (
            now - then for now, then in zip(_batches(server, target), batches_before, strict=True)
        )
        figures = summary(json.loads(told.read_text()), cpu_s)
        return {**figures, "mean_batch": images / batches} if batches else figures


def _batches(server: Server, target: Running) -> tuple[float, float]:
    """Return how many images and batches a server has inferred, as far as it tells."""
    if not server.metrics_path:
        return 0.0, 0.0
    try:
        with urlopen(f"http://127.0.0.1:{target.port}{server.metrics_path}") as answer:
            told = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines())
    except OSError as error:
        raise BenchmarkError(f"{server.name} does not tell its metrics: {error}") from error
    return float(told["mixer_batch_images_sum"]), float(told["mixer_batch_images_count"])


def summary(result: Figures, cpu_s: float) -> Figures:
    """Condense what the load generator saw.

    CPU time counts for the images that were classified, late ones too: refusals are no work done.
    """
    latencies = sorted(result["latencies_ms"])
    answered = sum(result["statuses"].values())
    classified = result["statuses"].get("200", 0)

    def percentile(share: float) -> float:
        return latencies[min(int(share * len(latencies)), len(latencies) - 1)] if latencies else 0.0

    return {
        "per_s": len(latencies) / result["seconds"],
        "cpu_ms": cpu_s / max(classified, 1) * 1000,
        "p50_ms": percentile(0.50),
        "p99_ms": percentile(0.99),
        "failed": answered - classified + result["unanswered"],
        "answered": answered,
        "load_cpu_ms": result["cpu_s"] / max(answered, 1) * 1000,
    }
