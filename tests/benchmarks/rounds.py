"""The order of the measurements: rounds that alternate between servers, and their medians.

Whatever else the machine does meanwhile then meets all servers alike.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from app.cpus import available_cpus
from tests.benchmarks import models
from tests.benchmarks.measure import Bench, Figures, closed_loops, front_end, open_loops
from tests.benchmarks.peers import FRONT_END, OURS, Server
from tests.benchmarks.photos import load_photos
from tests.benchmarks.processes import ROOT, BenchmarkError, install, installed_bytes

FOLDER = ROOT / ".bench"
CONNECTIONS = (1, 16, 64)
MAX_BATCH = 16
MIN_BATCHES = 20  # in one load: the first and the last of a large model would else matter
BARE_BATCHES = ("1", "2", "4", "8", "16")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Plan:
    """What is measured, and for how long."""

    servers: list[Server]
    models: list[str]
    photos: Path
    threads: int
    rounds: int
    seconds: float  # of one load, where `MIN_BATCHES` do not take longer
    rates: tuple[float, ...]  # of the open loop, as shares of the fastest server's throughput
    decoding: str  # of the peers: `ours`, or `plain` Pillow


class Rounds:
    """Carries out a plan."""

    def __init__(self, plan: Plan) -> None:
        """Count the visits.

        Raises:
            BenchmarkError: there are no photos.
        """
        self._plan = plan
        self._photos = load_photos(plan.photos)
        if not self._photos:
            raise BenchmarkError(f"--photos {plan.photos}: no .jpg or .jpeg in it")
        visits = plan.rounds * len(plan.servers)
        steps = len({OURS.name, *(server.name for server in plan.servers)})
        steps += visits + len(plan.models) * (1 + visits + plan.rounds)
        self._done = 0
        self._left_out: dict[str, str] = {}  # servers that broke, and how
        self._bar = tqdm(total=steps, unit="visit", disable=None)

    def run(self) -> Figures:
        """Return all figures.

        A server that cannot be installed, started or loaded is left out of what follows.

        Raises:
            BenchmarkError: that is so of all, or of the bare work.
        """
        plan = self._plan
        with self._bar, tempfile.TemporaryDirectory(prefix="mixer-bench-") as scratch:
            self._step(f"install {OURS.name}")  # it has what the bare work needs
            environments = {OURS.name: install(OURS, FOLDER)}
            for server in plan.servers:
                if server is not OURS:
                    self._step(f"install {server.name}")
                    for environment in self._visit(server, partial(install, server, FOLDER)):
                        environments[server.name] = environment
            bodies = {s.name: self._write_bodies(s, Path(scratch)) for s in plan.servers}
            measured = {}
            for name in plan.models:
                bench = self._bench(environments, bodies, name)
                self._step(f"{name}: bare work")
                bare = self._bare(bench)
                bench = replace(bench, label=bare["label"])
                seconds = max(plan.seconds, MIN_BATCHES * MAX_BATCH / bare["model"]["per_s"])
                measured[name] = self._closed(name, replace(bench, long_seconds=seconds), bare)
                # An hour's figures, should a server break in what follows.
                (FOLDER / "closed.json").write_text(json.dumps(measured, indent=1))
            benches = {
                name: replace(
                    self._bench(environments, bodies, name), label=measured[name]["bare"]["label"]
                )
                for name in plan.models
            }
            found = measured[plan.models[0]]["servers"].values()
            fastest = max(figures["closed"]["16"]["per_s"] for figures in found)
            rates = [float(f"{share * fastest:.3g}") for share in plan.rates]
            return {
                "conditions": self._conditions(),
                "installed_bytes": {n: installed_bytes(e) for n, e in environments.items()},
                "models": measured,
                **self._open(benches, rates),
                "left_out": self._left_out,
            }

    def _closed(self, name: str, bench: Bench, before: Figures) -> Figures:
        bare = [before]
        visits: dict[str, list[Figures]] = {server.name: [] for server in self._plan.servers}
        for number in range(self._plan.rounds):
            for server in self._in_turn(number):
                self._step(f"{name}: {server.name}, round {number + 1}")
                measure = partial(closed_loops, bench, server, CONNECTIONS)
                visits[server.name] += self._visit(server, measure)
            bare.append(self._bare(bench))
        return {"bare": median(bare), "servers": self._medians(visits)}

    def _open(self, benches: dict[str, Bench], rates: list[float]) -> Figures:
        first, *_ = benches.values()
        visits: dict[str, list[Figures]] = {server.name: [] for server in self._plan.servers}
        ends: dict[str, list[Figures]] = {name: [] for name in benches}
        for number in range(self._plan.rounds):
            for server in self._in_turn(number):
                self._step(f"open loop: {server.name}, round {number + 1}")
                measure = partial(open_loops, first, server, rates)
                visits[server.name] += self._visit(server, measure)
            for name, bench in benches.items():
                self._step(f"front end: {name}, round {number + 1}")
                if OURS in self._plan.servers:
                    ends[name] += self._front_end(bench)
        return {
            "open": self._medians(visits),
            "front_end": {name: median(found) for name, found in ends.items() if found},
        }

    def _visit(self, server: Server, measure: Callable[[], Found]) -> list[Found]:
        """Return what is measured, in a list; an empty one if the server breaks, or has before."""
        if server.name in self._left_out:
            return []
        try:
            return [measure()]
        except BenchmarkError as error:
            self._left_out[server.name] = str(error)
            self._bar.write(f"left out from here on: {error}", sys.stderr)
            return []

    def _medians(self, visits: dict[str, list[Figures]]) -> Figures:
        """Return the medians of the visits to each server that was not always left out.

        Raises:
            BenchmarkError: all were.
        """
        if not any(visits.values()):
            raise BenchmarkError("; ".join(self._left_out.values()))
        return {name: median(found) for name, found in visits.items() if found}

    def _front_end(self, bench: Bench) -> list[Figures]:
        """Return, for one core and for two, what is served and what decoding alone would do.

        In a list, an empty one if the server breaks.
        """
        cores = sorted(os.sched_getaffinity(0))
        found = {}
        for count in sorted({1, min(2, available_cpus())}):
            chosen = frozenset(cores[:count])
            decode = self._bare(bench, chosen)["decode"]
            for served in self._visit(OURS, partial(front_end, bench, FRONT_END, chosen)):
                found[str(count)] = {"served": served, "decode": decode}
        return [] if OURS.name in self._left_out else [found]

    def _bare(self, bench: Bench, cores: frozenset[int] | None = None) -> Figures:
        command = [bench.environments[OURS.name] / "bin/python", "-m", "tests.benchmarks.bare"]
        arguments = [str(self._plan.photos), str(self._plan.seconds / 4), *BARE_BATCHES]
        if cores is not None:
            command = ["taskset", "-c", ",".join(map(str, cores)), *command]
        done = subprocess.run(
            [*map(str, command), *arguments],
            cwd=ROOT,
            env=os.environ | bench.variables | {"BENCH_DECODING": "ours"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise BenchmarkError(f"the bare work failed: {done.stderr.strip()[-300:]}")
        figures: Figures = json.loads(done.stdout)
        return figures

    def _in_turn(self, number: int) -> list[Server]:
        return self._plan.servers[:: -1 if number % 2 else 1]

    def _bench(
        self, environments: dict[str, Path], bodies: dict[str, list[Path]], name: str
    ) -> Bench:
        seconds = self._plan.seconds
        variables = self._variables(name)
        return Bench(environments, bodies, self._photos[0], "", variables, seconds, seconds)

    def _variables(self, name: str) -> dict[str, str]:
        path = models.model_file(name, FOLDER / "models")
        return {
            "BENCH_MODEL": str(path),
            "BENCH_THREADS": str(self._plan.threads),
            "BENCH_MAX_BATCH": str(MAX_BATCH),
            "BENCH_DECODING": self._plan.decoding,
            "BENCH_PREPROCESSING": models.preprocessing_of(path).model_dump_json(),
        }

    def _write_bodies(self, server: Server, scratch: Path) -> list[Path]:
        paths = []
        for number, photo in enumerate(self._photos):
            path = scratch / f"{server.name}-{number}"
            path.write_bytes(server.body(photo))
            paths.append(path)
        return paths

    def _conditions(self) -> Figures:
        plan = self._plan
        return {
            "cpus": available_cpus(),
            "load_average": os.getloadavg()[2],
            "python": platform.python_version(),
            "onnxruntime": version("onnxruntime"),
            "photos": len(self._photos),
            "photos_from": plan.photos.name if plan.photos.exists() else "generated",
            "photo_bytes": round(statistics.mean(map(len, self._photos))),
            "threads": plan.threads,
            "max_batch": MAX_BATCH,
            "rounds": plan.rounds,
            "seconds": plan.seconds,
            "decoding": plan.decoding,
        }

    def _step(self, what: str) -> None:
        """Tell what begins: by the bar on a terminal, by a line elsewhere."""
        if self._bar.disable:
            sys.stderr.write(f"{self._done} of {self._bar.total}: {what}\n")
        self._done += 1
        self._bar.set_description_str(what)
        self._bar.update()


def median(found: list[Any]) -> Any:
    """Return the medians of figures of one shape."""
    if isinstance(found[0], dict):
        return {key: median([one[key] for one in found]) for key in found[0]}
    if isinstance(found[0], str):
        return found[0]  # what is no figure is the same throughout
    if isinstance(found[0], int):
        return statistics.median_low(found)  # a batch of 12 that nobody tried tells nothing
    return statistics.median(found)
