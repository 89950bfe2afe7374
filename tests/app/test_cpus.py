"""How many CPUs the service takes for its own, under the quotas of cgroups."""

import sys
from pathlib import Path

import pytest

from app.cpus import available_cpus

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="cgroups are Linux's")
V1 = "4:memory:/a\n2:cpu,cpuacct:/system.slice/mixer.service\n0::/\n"
V2 = "0::/system.slice/mixer.service\n"


@pytest.mark.parametrize(
    ("own", "files", "cpus"),
    [
        ("0::/\n", {"cpu.max": "max 100000"}, 8),
        ("0::/\n", {"cpu.max": "250000 100000"}, 3),
        ("0::/\n", {"cpu.max": "5000 100000"}, 1),
        (V2, {"system.slice/mixer.service/cpu.max": "200000 100000"}, 2),
        (V2, {"system.slice/cpu.max": "300000 100000"}, 3),
        (V2, {"cpu.max": "max 100000", "system.slice/cpu.max": "1600000 100000"}, 8),
        ("0::/host/only/there\n", {"cpu.max": "200000 100000"}, 2),
        (V1, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        (V1, {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
        (
            V1,
            {
                "cpu/cpu.cfs_quota_us": "-1",
                "cpu/cpu.cfs_period_us": "100000",
                "cpu/system.slice/mixer.service/cpu.cfs_quota_us": "50000",
                "cpu/system.slice/mixer.service/cpu.cfs_period_us": "20000",
            },
            3,
        ),
        (V1, {"cpu/a/cpu.cfs_quota_us": "100000", "cpu/a/cpu.cfs_period_us": "100000"}, 8),
        ("a sandbox's own\n", {"cpu.max": "200000 100000"}, 2),
        ("", {"cpu.max": "200000 100000"}, 2),
    ],
)
def test_quota(
    own: str, files: dict[str, str], cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smallest quota of the process's cgroup and those above it, rounded up, is what counts."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8))
    for name, text in files.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(text + "\n")
    (tmp_path / "own").write_text(own)
    assert available_cpus(tmp_path / "cgroup", tmp_path / "own") == cpus


def test_no_cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without cgroups to read, the scheduler affinity counts."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8))
    assert available_cpus(tmp_path, tmp_path / "absent") == 8
