"""How many CPUs this container may really use, and which threads go first on them."""

import contextlib
import math
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path, PurePath

# While there are not cores enough for all, a decoder has a tenth of an ordinary thread's share, and
# a thread that infers two thirds of a decoder's: pictures then come faster than they are inferred,
# and batches fill up.
DECODING_NICE = 10
INFERENCE_NICE = 12


def available_cpus(
    cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> int:
    """Return the whole CPUs of the scheduler affinity, cut to the quotas of the process's cgroups.

    `os.cpu_count()` would say 64 in a container that is throttled to 2, and 64 threads would then
    spend their time waiting for each other.
    """
    # macOS has no affinity.
    cpus = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, min([cpus, *(math.ceil(quota) for quota in _quotas(cgroups, own))]))


def _quotas(cgroups: Path, own: Path) -> Iterator[float]:
    """Yield the CPUs that the process's cgroup and each above it may use (v2 and v1, cgroups(7)).

    A container sees its own as the root; a service of systemd lies some folders below.
    """
    paths = ["/"]
    with contextlib.suppress(OSError, ValueError):  # macOS, or a sandbox
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "" or "cpu" in controllers.split(","):
                paths.append(path)
    folders = {folder for path in paths for folder in (PurePath(path), *PurePath(path).parents)}
    for folder in folders:
        below = str(folder).lstrip("/")
        with contextlib.suppress(OSError, ValueError):  # no quota, or a folder of the host's
            quota, period = (cgroups / below / "cpu.max").read_text().split()
            yield int(quota) / int(period)
        with contextlib.suppress(OSError, ValueError):
            quota = (cgroups / "cpu" / below / "cpu.cfs_quota_us").read_text()
            period = (cgroups / "cpu" / below / "cpu.cfs_period_us").read_text()
            if int(quota) > 0:  # -1 is none
                yield int(quota) / int(period)


def give_way(nice: int, process: int = 0) -> None:
    """Let the other threads of `process`, by default this one, go before the calling one.

    And before those that it starts; by so much more than the nice value that the service has.

    Decoding and inference can fill every core. The event loop needs little, but needs it at once: a
    refusal or a probe that waits its turn among them is late by all of their time slices.
    """
    if sys.platform == "linux":  # where a thread has a priority of its own
        # A sandbox may forbid it; then all are alike.
        with contextlib.suppress(OSError):
            own = os.getpriority(os.PRIO_PROCESS, process or os.getpid())  # its first thread's
            most = 19  # setpriority(2)
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(most, own + nice))
