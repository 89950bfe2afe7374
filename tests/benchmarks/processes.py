"""Servers as processes: installed, started, watched, stopped."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.benchmarks.peers import Server

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 15.0


class BenchmarkError(Exception):
    """A server cannot be installed or does not start; the message says where its output is."""


def install(server: Server, folder: Path) -> Path:
    """Return the server's own virtual environment, made on first use."""
    environment = folder / server.name.lower()
    log, mark = folder / f"{server.name.lower()}.log", environment / "installed"
    wanted = "\n".join(server.packages)
    if "--editable" in server.packages:
        wanted += (ROOT / "pyproject.toml").read_text()  # its dependencies are there
    if mark.exists() and mark.read_text() == wanted:
        return environment
    folder.mkdir(parents=True, exist_ok=True)
    create = [sys.executable, "-m", "venv", str(environment)]
    pip = [str(environment / "bin/python"), "-m", "pip", "install", "--quiet"]
    with log.open("w") as output:
        for command in (create, [*pip, *server.packages]):
            if subprocess.run(command, cwd=ROOT, stdout=output, stderr=output).returncode:
                raise BenchmarkError(
                    f"{server.name} cannot be installed: see {log}, or leave it out of --servers"
                )
    mark.write_text(wanted)
    return environment


def installed_bytes(environment: Path) -> int:
    """Return the size of the packages in a virtual environment, pip and setuptools left out."""
    packages = next(environment.glob("lib/python*/site-packages"))
    return sum(
        file.lstat().st_size
        for folder in packages.iterdir()
        if not folder.name.startswith(("pip", "setuptools"))
        for file in ([folder] if folder.is_file() else folder.rglob("*"))
        if file.is_file()
    )


@dataclass
class Running:
    """A server that answers."""

    port: int
    ready_s: float
    process: psutil.Process

    def cpu_s(self) -> float:
        """Return the CPU seconds of all its processes so far, of those that have ended, too."""
        return self._sum(lambda process: sum(process.cpu_times()[:4]))

    def pss_bytes(self) -> int:
        """Return its memory, each shared page divided by its sharers."""
        return int(self._sum(lambda process: process.memory_full_info().pss))

    def _sum(self, read: Callable[[psutil.Process], float]) -> float:
        found = 0.0
        try:
            for process in [*self.process.children(recursive=True), self.process]:
                with contextlib.suppress(psutil.NoSuchProcess):  # its parent has its CPU time now
                    found += read(process)
        except psutil.Error as error:
            raise BenchmarkError(f"the server has ended: {error}") from error
        return found


@contextmanager
def running(
    server: Server,
    environment: Path,
    variables: dict[str, str],
    photo: bytes,
    label: str,
    cores: frozenset[int] | None = None,
) -> Iterator[Running]:
    """Start a server, wait until it finds `label` in a photo, and stop it with all its processes.

    Raises:
        BenchmarkError: it ends, is not ready for long, or does not find the label.
    """
    port = _free_port()
    words = {
        "bin": str(environment / "bin"),
        "port": str(port),
        "model": variables["BENCH_MODEL"],
        "threads": variables["BENCH_THREADS"],
        "batch": variables["BENCH_MAX_BATCH"],
    }
    log = environment.parent / f"{server.name.lower()}.output"
    begin = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            server.command.format_map(words).split(),
            cwd=ROOT,
            env=_environment(environment.parent / "home") | variables | {"BENCH_PORT": str(port)},
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=lambda: _prepare(cores),
        )
    watched = psutil.Process(process.pid)
    family = [watched]
    try:
        while (answer := _answer(server, port, photo)) is None:
            if process.poll() is not None or time.perf_counter() > begin + START_TIMEOUT_S:
                raise BenchmarkError(f"{server.name} does not start: see {log}")
            time.sleep(0.02)
        ready_s = time.perf_counter() - begin
        if process.poll() is not None or label.encode() not in answer:
            raise BenchmarkError(f"{server.name} does not find '{label}': {answer[:300]!r}")
        yield Running(port, ready_s, watched)
    finally:
        if process.poll() is None:
            family += watched.children(recursive=True)
            process.send_signal(signal.SIGINT)
        _, alive = psutil.wait_procs(family, STOP_TIMEOUT_S)
        for left in alive:
            left.kill()
        process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # whom a server that has died has left behind


def _prepare(cores: frozenset[int] | None) -> None:
    """Let a server that begins be stopped by SIGINT, which a job in the background passes over."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if cores is not None:
        os.sched_setaffinity(0, cores)


def _answer(server: Server, port: int, photo: bytes) -> bytes | None:
    """Return what a real photo gets with status 200, if it does."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_TIMEOUT_S)
    body = server.body(photo)
    head = server.head(port).replace("{length}", str(len(body))).split("\r\n")[1:]
    headers = dict(line.split(": ", 1) for line in head if line)
    try:
        connection.request("POST", server.path, body, headers)
        response = connection.getresponse()
        return response.read() if response.status == 200 else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _environment(home: Path) -> dict[str, str]:
    """Return this environment without settings that would tilt the comparison.

    What servers leave in their users' homes goes to `home`.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MIXER_", "BENCH_"))}
    return kept | {
        "PYTHONPATH": str(ROOT),
        "BENTOML_DO_NOT_TRACK": "1",
        "BENTOML_HOME": str(home / "bentoml"),
        "PYTRITON_HOME": str(home / "pytriton"),
        # Triton's Python stub loads libpython by name: it must be this interpreter's own.
        "LD_LIBRARY_PATH": str(sysconfig.get_config_var("LIBDIR")),
    }


def _free_port() -> int:
    """Return a port that is free with the two after it: Triton wants three.

    Below those that the system gives to outgoing connections, which the load makes many of.
    """
    for port in range(20_000, 32_000, 3):
        with contextlib.ExitStack() as probes, contextlib.suppress(OSError):
            for offset in range(3):
                probes.enter_context(socket.socket()).bind(("127.0.0.1", port + offset))
            return port
    raise BenchmarkError("no three ports in a row are free from 20000 to 32000")
