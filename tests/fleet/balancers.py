"""The balancers of docker/, run on this machine.

Their files are used as they are, but for what belongs to the place: addresses, ports and folders.
"""

import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2

from tests.fleet.replicas import Replica, free_port, wait_for
from tests.processes import ROOT

PROGRAMS = {"nginx": "nginx", "haproxy": "haproxy"}
EJECTION = re.compile(r"upstream server temporarily disabled|Server \S+ is DOWN")


@dataclass(frozen=True)
class Balancer:
    """A running balancer; `read_timeout_s` is how long it waits for a replica's answer."""

    name: str
    url: str
    read_timeout_s: float
    log: Path

    def ejections(self) -> int:
        """Return how often it took a replica out of use."""
        return len(EJECTION.findall(self.log.read_text()))


@contextmanager
def balancing(name: str, replicas: Sequence[Replica], folder: Path) -> Iterator[Balancer]:
    """Run a balancer before the replicas."""
    port = free_port()
    log = folder / f"{name}.log"
    file = folder / f"{name}.conf"
    ports = [replica.port for replica in replicas]
    text = (nginx_file if name == "nginx" else haproxy_file)(ports, port, folder)
    file.write_text(text)
    timeout = re.search(r"(?:proxy_read_timeout|timeout server) +(\d+)s", text)
    assert timeout is not None
    # Started by root, nginx would give up root and could not write into the test's folder.
    stay = "daemon off;" + (" user root;" if os.geteuid() == 0 else "")
    command = {
        "nginx": ["nginx", "-e", "stderr", "-p", str(folder), "-g", stay, "-c", str(file)],
        "haproxy": ["haproxy", "-db", "-f", str(file)],
    }[name]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    balancer = Balancer(name, f"http://127.0.0.1:{port}", float(timeout[1]), log)
    try:
        wait_for(lambda: _answers(balancer), f"{name} does not answer; see {log}")
        yield balancer
    finally:
        process.terminate()
        process.wait()


def nginx_file(replicas: Sequence[int], port: int, folder: Path) -> str:
    """Return docker/nginx.conf for replicas and balancer on these ports."""
    text = (ROOT / "docker/nginx.conf").read_text()
    text = _replace(text, r"resolver [^;]*;", "")  # addresses need none
    (server,) = re.findall(r"server mixer:8000 resolve ([^;]*;)", text)
    servers = "\n".join(f"server 127.0.0.1:{replica} {server}" for replica in replicas)
    text = _replace(text, r"server mixer:8000 resolve [^;]*;", servers)
    text = _replace(text, r"listen 8080;", f"listen 127.0.0.1:{port};")
    text = _replace(text, r" /tmp/", f" {folder}/")
    text = _replace(text, r"(?m)^error_log \S+ error;", "error_log /dev/stderr warn;")  # ejections
    return _replace(text, r"/dev/std(?:err|out)", str(folder / "nginx.log"))


def haproxy_file(replicas: Sequence[int], port: int, _: Path) -> str:
    """Return docker/haproxy.cfg for replicas and balancer on these ports."""
    text = (ROOT / "docker/haproxy.cfg").read_text()
    servers = "\n".join(
        f"    server replica{number} 127.0.0.1:{replica}" for number, replica in enumerate(replicas)
    )
    text = _replace(text, r" *server-template .*", servers)
    text = _replace(text, r"(?s)\nresolvers .*", "")
    return _replace(text, r"bind :8080", f"bind 127.0.0.1:{port}")


def _replace(text: str, pattern: str, replacement: str) -> str:
    changed, times = re.subn(pattern, replacement, text)
    assert times, f"the balancer's file has no {pattern}"
    return changed


def _answers(balancer: Balancer) -> bool:
    try:
        httpx2.get(f"{balancer.url}/readyz", timeout=5)
    except httpx2.TransportError:
        return False
    return True
