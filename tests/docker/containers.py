"""A container as an orchestrator would run it: the image's own command, user and variables.

Its root file system is read-only, `/tmp` is a tmpfs, it is process 1 of its own process namespace,
it can gain no privilege, and its shells are gone. It shares the network of the machine.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2

from tests.docker.images import Image

START_TIMEOUT_S = 30.0  # a loaded machine; on a quiet one it is about 2 s

# Arguments: the image's files, a host file and where it is mounted (or two empty strings), the
# user and the group, then the command.
ENTER = """
set -e
root=$1 source=$2 target=$3 user=$4; shift 4
mount --bind "$root" "$root"
mount -t tmpfs -o size=64m,mode=1777 tmpfs "$root/tmp"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
if [ -n "$source" ]; then mount --bind "$source" "$root$target"; fi
for shell in dash bash; do mount --bind /dev/null "$root/usr/bin/$shell"; done
mount -o remount,bind,ro "$root"
exec setpriv --no-new-privs chroot --userspec="$user" --groups= "$root" "$@"
"""


@dataclass
class Container:
    """A running container; `process` is the outermost process, `pid` the container's own."""

    image: Image
    process: "subprocess.Popen[str]"
    url: str

    @property
    def pid(self) -> int:
        """Return the machine's number of the container's process 1."""
        return _children(self.process)[0]

    def status(self, name: str) -> str:
        """Return a line of the container's process 1 from `/proc`, such as its `Uid`."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return line.partition(":")[2].strip()
        raise AssertionError(f"/proc knows no {name}")

    def run(self, *command: str) -> "subprocess.CompletedProcess[str]":
        """Run a command inside, as an orchestrator runs a health check."""
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--pid"]
        chroot = ["chroot", f"--userspec={self.image.config['User']}", str(self.image.files)]
        environment = self.image.environment | {"MIXER_PORT": self.url.rpartition(":")[2]}
        return subprocess.run(
            [*enter, *chroot, *command],
            env=environment,
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT_S,
            check=False,
        )


def start(
    image: Image,
    settings: Mapping[str, str] | None = None,
    mount: tuple[Path, str] | None = None,
    command: Sequence[str] = (),
) -> "subprocess.Popen[str]":
    """Start the image's command, or another one, with settings, and perhaps a file mounted."""
    source, target = (str(mount[0]), mount[1]) if mount else ("", "")
    isolate = ["unshare", "--mount", "--pid", "--fork", "sh", "-c", ENTER, "sh"]
    return subprocess.Popen(
        [
            *isolate,
            *(str(image.files), source, target, image.config["User"]),
            *(command or image.config["Cmd"]),
        ],
        env=image.environment | dict(settings or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def running(image: Image, port: int, **settings: str) -> Iterator[Container]:
    """Run a container until the end of the block, ready from its beginning."""
    process = start(image, {"MIXER_PORT": str(port)} | settings)
    container = Container(image, process, f"http://127.0.0.1:{port}")
    try:
        _wait_until_ready(container)
        yield container
    finally:
        finish(process, timeout_s=0)


def finish(
    process: "subprocess.Popen[str]", timeout_s: float = START_TIMEOUT_S
) -> tuple[str, list[str]]:
    """Wait for a container to end, or end it; return its standard output and its error lines."""
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        # The container's process 1 takes all others of its namespace with it.
        for pid in _children(process):
            os.kill(pid, signal.SIGKILL)
    output, errors = process.communicate(timeout=START_TIMEOUT_S)
    return output, errors.splitlines()


def _children(process: "subprocess.Popen[str]") -> list[int]:
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in listed.split()]


def _wait_until_ready(container: Container) -> None:
    give_up = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < give_up and container.process.poll() is None:
        try:
            if httpx2.get(f"{container.url}/readyz").status_code == httpx2.codes.OK:
                return
        except httpx2.TransportError:
            time.sleep(0.05)
    raise AssertionError(f"the container is not ready: {finish(container.process, timeout_s=0)}")
