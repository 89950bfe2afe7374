"""Real `mixer-serve` processes for tests that must see start-up, signals and sockets."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2

ROOT = Path(__file__).parent.parent
START_TIMEOUT_S = 30.0  # a loaded CI machine; on a quiet one it is below 2 s


def clean_environment(**settings: str) -> dict[str, str]:
    """Return this environment without `MIXER_…` variables, plus `settings`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MIXER_")}
    return kept | settings


def run_serve(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run `mixer-serve` where it is expected to end by itself."""
    return subprocess.run(
        [sys.executable, "-m", "app.serve", *arguments],
        cwd=ROOT,
        env=clean_environment(MIXER_PORT="0") | settings,
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
        check=False,
    )


@dataclass
class Server:
    """A running service."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    def resident_mib(self) -> float:
        """Return the physical memory that the service's processes hold, in MiB."""
        pages = sum(int(_read(pid, "statm").split()[1]) for pid in self.pids())
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def peak_mib(self) -> float:
        """Return the most physical memory that each of them has ever held, added up, in MiB."""
        # One that has just ended has no memory, and no such line.
        kib = (re.search(r"VmHWM:\s*(\d+)", _read(pid, "status")) for pid in self.pids())
        return sum(int(found[1]) for found in kib if found) / 1024

    def pids(self) -> list[int]:
        """Return the service's own process and all below it, the decoders."""
        found = [self.process.pid]
        for pid in found:  # which grows meanwhile
            for thread in Path(f"/proc/{pid}/task").iterdir():
                found += [int(child) for child in (thread / "children").read_text().split()]
        return found

    def descriptors(self) -> int:
        """Return how many files and sockets the service's processes have open."""
        return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in self.pids())

    def threads(self) -> int:
        """Return how many threads the process has."""
        return len(list(Path(f"/proc/{self.process.pid}/task").iterdir()))

    def cpu_s(self) -> float:
        """Return the CPU seconds that the service's processes have used."""
        return sum(cpu_s(pid) for pid in self.pids())


def cpu_s(pid: int) -> float:
    """Return the CPU seconds that a process has used."""
    fields = _read(pid, "stat").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def files_to_write(pid: int) -> set[Path]:
    """Return the files that a process has open for writing; what it reads is no upload."""
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # a connection that closes meanwhile
            flags = _read(pid, f"fdinfo/{link.name}").partition("flags:")[2]
            if link.is_file() and int(flags.split()[0], 8) & os.O_ACCMODE != os.O_RDONLY:
                found.add(link.readlink())
    return found


def _read(pid: int, file: str) -> str:
    return Path(f"/proc/{pid}/{file}").read_text()


@contextmanager
def serving(
    log: Path, *arguments: str, module: str = "app.serve", **settings: str
) -> Iterator[Server]:
    """Start `mixer-serve` on a free port and wait until it is ready; kill it at the end."""
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", module, "--port", "0", *arguments],
            cwd=ROOT,
            env=clean_environment(**settings),
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:
        yield Server(process, _wait_until_ready(process, log), log)
    finally:
        process.kill()
        process.wait()


def _wait_until_ready(process: "subprocess.Popen[str]", log: Path) -> str:
    give_up = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < give_up and process.poll() is None:
        found = re.search(r"http://[^\s\"]+:\d+", log.read_text())
        if found is not None:
            try:
                if httpx2.get(f"{found[0]}/readyz").status_code == 200:
                    return found[0]
            except httpx2.TransportError:
                pass  # bound, but not yet listening
        time.sleep(0.02)
    raise AssertionError(f"not ready (exit code {process.returncode}):\n{log.read_text()}")
