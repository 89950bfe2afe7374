"""The compose files, as far as they can be checked without Docker."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.settings import Settings
from tests.docker.test_kubernetes import LAST_WORDS_S

DOCKER = Path(__file__).parents[2] / "docker"


@pytest.mark.parametrize("files", [("compose.yaml",), ("compose.yaml", "compose.gpu.yaml")])
def test_compose_accepts_its_files(files: tuple[str, ...], tmp_path: Path) -> None:
    """Docker Compose finds no fault in the files, alone and together."""
    if shutil.which("docker-compose") is None:
        pytest.skip("docker-compose is not installed")
    arguments = []
    for name in files:
        # Compose 1.29, which needs no Docker, is older than the top-level name.
        text = re.sub(r"^name: .*\n", "", (DOCKER / name).read_text(), flags=re.MULTILINE)
        (tmp_path / name).write_text(text)
        arguments += ["-f", str(tmp_path / name)]
    done = subprocess.run(
        ["docker-compose", *arguments, "config", "--quiet"],  # noqa: S607 - wherever it is installed
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_replicas_are_locked_down() -> None:
    """Three replicas run read-only, without capabilities, and have time to drain."""
    mixer = _services("compose.yaml")["mixer"]
    assert mixer["deploy"]["replicas"] == 3
    assert mixer["read_only"] is True
    assert mixer["cap_drop"] == ["ALL"]
    settings = Settings()
    grace_s = int(mixer["stop_grace_period"].removesuffix("s"))
    assert grace_s >= settings.drain_delay_s + settings.grace_s + LAST_WORDS_S


def test_memory_is_what_the_limits_add_up_to() -> None:
    """Each memory limit has room for the sum in ARCHITECTURE.md, for as many decoders as CPUs."""
    text = (DOCKER.parent / "ARCHITECTURE.md").read_text().split("and what they add up to")[1]
    row = r"^\| \*?\*?(.+?)\*?\*? \|.*\| \*?\*?(?:about )?([\d,]+)\*?\*? \|$"
    rows = re.findall(row, text, re.MULTILINE)
    mib = {what: int(number.replace(",", "")) for what, number in rows}
    total = mib.pop("sum")
    assert abs(sum(mib.values()) - total) < 10
    at_work = next(number for what, number in mib.items() if what.startswith("decoders at work"))
    mixer = _services("compose.yaml")["mixer"]["deploy"]["resources"]["limits"]
    assert mixer == {"cpus": "1", "memory": f"{_fitting(total - at_work / 2)}M"}
    for name in ("inferenceservice.yaml", "base/deployment.yaml"):
        limit = f"memory: {_fitting(total)}Mi"
        assert limit in (DOCKER / "kubernetes" / name).read_text()


def _fitting(mib: float) -> int:
    """Return it with what may lie in /tmp, in the next whole quarter of a GiB."""
    return -int(-(mib + 64) // 256) * 256


def test_the_gpu_file_reserves_a_gpu() -> None:
    """compose.gpu.yaml builds the GPU image and reserves an NVIDIA device."""
    mixer = _services("compose.gpu.yaml")["mixer"]
    assert mixer["build"]["target"] == "gpu"
    (device,) = mixer["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])


def test_monitoring_is_a_profile() -> None:
    """Prometheus and Grafana start only when their profile is asked for."""
    services = _services("compose.yaml")
    optional = {name for name, service in services.items() if "profiles" in service}
    assert optional == {"prometheus", "grafana"}


def test_every_image_is_pinned_by_version() -> None:
    """Each image that is not built here names a release."""
    for service in _services("compose.yaml").values():
        if "build" not in service:
            assert re.search(r":v?\d+\.\d+\.\d+", service["image"])


def _services(name: str) -> dict[str, Any]:
    services: dict[str, Any] = yaml.safe_load((DOCKER / name).read_text())["services"]
    return services
