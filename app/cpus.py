"""How many CPUs this container may really use, and which threads go first on them."""

import contextlib
import math
import os
import sys
import threading
from pathlib import Path

# While there are not cores enough for all, a decoder has a tenth of an ordinary thread's share, and
# a thread that infers two thirds of a decoder's: pictures then come faster than they are inferred,
# and batches fill up.
DECODING_NICE = 10
INFERENCE_NICE = 12


def available_cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the whole CPUs of the scheduler affinity, cut to the cgroup's quota (v2, then v1).

    `os.cpu_count()` would say 64 in a container that is throttled to 2, and 64 threads would then
    spend their time waiting for each other.
    """
    # macOS has no affinity.
    cpus = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (cgroup / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return cpus
    if quota in ("max", "-1"):
        return cpus
    return max(1, min(cpus, math.ceil(int(quota) / int(period))))


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
